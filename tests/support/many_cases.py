"""What runs in each of several processes; see `processes.launch`. In one process the same functions give the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture
from models import WIDE, adapter_weights, batches, documents, tiny_llama, with_lora
from peft import PeftModel
from picture import differences, picture
from planning import Forced, Way, recorded
from settings import as_solved
from stacks import stacked, with_experts, without_expert
from torch import distributed as dist
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_da.first_step
import lora_da.initialize
from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.adapter import AdapterLayer
from lora_da.collect.feed import Feed
from lora_da.collect.segment import SegmentRun
from lora_da.model.blocks import BlockSequence
from lora_da.solve import LayerSolver

TIMEOUT = 120  # seconds that a process waits for another before torch gives up
SAMPLES = 7  # over 2 and over 4 processes unevenly
# A few tokens only, so that the models of every test know them all.
ROWS = [{k: [i if i < 0 else i % 90 + 3 for i in v] for k, v in row.items()} for row in documents(SAMPLES, longest=40)]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    try:
        yield
    finally:
        dist.destroy_process_group()


def initialized(
    model: PeftModel, way: Way, rows: Any = None, rate: float | None = None, **settings: Any
) -> dict[str, Any]:
    """The adapter, what the report counts, and which layers this process solved, under one forced plan."""
    population = 1000 if settings.get("method", "lora_da") == "lora_da" else None
    settings = settings if "method" in settings else {"first_step": "gamma", **settings}
    config = LoraDAConfig(population_size=population, samples=SAMPLES, **settings)
    data = rows or batches(ROWS, 3)
    with recorded() as statistics:
        report = initialize_lora_da_weights(
            model, data, config, show_progress=False, plan=Forced(way), learning_rate=rate
        )
    return {
        "adapter": adapter_weights(model),
        "solved": sorted(statistics),
        "counts": (report.initialized, report.samples, report.tokens, report.loss_tokens, report.failed, report.left),
        "layer tokens": {name: layer.tokens for name, layer in report.layers.items()},
        "loss": report.loss,
        "gradient norms": report.gradient_norms,
        "tried": None if report.first_step is None else report.first_step.tried,
        "from cache": report.from_cache,
    }


def llama() -> PeftModel:
    return with_lora(tiny_llama(num_hidden_layers=4))


def experts() -> PeftModel:
    """No token goes to one expert of each mixture; with so few tokens, others are idle in some processes only."""
    return with_lora(mixture(closed=1), r=2, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"])


def nf4(folder: Path) -> PeftModel:
    if rank() == 0:  # transformers saves in the first process only
        tiny_llama(**WIDE).save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return with_lora(AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization))


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "one pass": lambda _: initialized(llama(), Way()),
    "3 segments": lambda _: initialized(llama(), Way(cuts=3)),
    "2 segments in 3 parts": lambda _: initialized(llama(), Way(cuts=2, parts=3)),
    "3 passes": lambda _: initialized(llama(), Way(parts=3, cut=False)),
    "4 segments, one border held": lambda _: initialized(llama(), Way(cuts=4, borders=3)),
    "2 segments, checkpointed, no border held": lambda _: initialized(llama(), Way(cuts=2, again=True, borders=1)),
    "sample averaging": lambda _: initialized(llama(), Way(), preset="reference"),
    "full Fisher": lambda _: initialized(llama(), Way(cuts=2), full_fisher_up_to=4096),
    "fewer samples than processes": lambda _: initialized(llama(), Way(cuts=2), rows=batches(ROWS[:1], 1)),
    "nf4": lambda folder: initialized(nf4(folder), Way()),
    "filet": lambda _: initialized(llama(), Way(cuts=2), method="filet"),
    "filet, nf4": lambda folder: initialized(nf4(folder), Way(), method="filet"),
    "cntlora": lambda _: initialized(llama(), Way(cuts=3), method="cntlora"),
    "cntlora, experts": lambda _: initialized(experts(), Way(), method="cntlora"),
    "lora_one": lambda _: initialized(llama(), Way(parts=2, cut=False), method="lora_one"),
    "lora_ga": lambda _: initialized(llama(), Way(), method="lora_ga", averaging="samples"),
    "experts": lambda _: initialized(experts(), Way()),
    "expert stacks": lambda _: initialized(without_expert(1), Way(cuts=2)),
    "expert stacks, 3 passes": lambda _: initialized(with_experts(stacked("GptOss")), Way(parts=3, cut=False)),
    "expert stacks, measured": lambda _: initialized(without_expert(1), Way(cuts=3), first_step="measured"),
    "first step measured": lambda _: initialized(llama(), Way(cuts=3), first_step="measured"),
    "first step measured, other rates than the first's": lambda _: initialized(
        llama(), Way(cuts=3), rate=10.0 if rank() else 1e-7, first_step="measured"
    ),
    "first step measured, nf4": lambda folder: initialized(nf4(folder), Way(), first_step="measured"),
}


def everything(folder: Path) -> dict[str, Any]:
    with process_group():
        found: dict[str, Any] = {name: case(folder) for name, case in CASES.items()}
        return {**found, "faults": faults(), "memory": memory(), "cache": cached(folder / "cache")}


def one_case(folder: Path) -> dict[str, Any]:
    with process_group():
        return {"one pass": CASES["one pass"](folder)}


class Broken(Exception):
    """What a test makes a process raise."""


def fails_in(patch: pytest.MonkeyPatch, owner: Any, method: str, where: int, error: Exception, call: int = 1) -> None:
    """The n-th call of a method raises in one process."""
    original, calls = getattr(owner, method), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if rank() == where and calls[0] == call:
            raise error
        return original(*args, **kwargs)

    patch.setattr(owner, method, failing)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "adapter": lambda p: fails_in(p, lora_da.initialize, "find_adapter", 1, LoraDAError("broken")),
    "data": lambda p: fails_in(p, lora_da.initialize, "draw", 0, Broken("broken")),
    "survey": lambda p: fails_in(p, BlockSequence, "learn", 1, Broken("broken")),
    "borders": lambda p: fails_in(p, Feed, "inputs", 1, Broken("broken")),
    "pass": lambda p: fails_in(p, SegmentRun, "_run_top", 1, Broken("broken")),
    "solve": lambda p: fails_in(p, LayerSolver, "solve", 1, Broken("broken"), call=2),
    "first step": lambda p: fails_in(p, lora_da.first_step, "_loss", 1, Broken("broken"), call=2),
    "trial": lambda p: fails_in(p, AdapterLayer, "write", 1, Broken("broken"), call=3),
    "write": lambda p: fails_in(p, AdapterLayer, "write", 1, Broken("broken"), call=3),
}


OF_THE_FIRST_STEP = ("first step", "trial")


def cached(folder: Path) -> dict[str, Any]:
    """A first run that keeps its solution, and a second that finds it, unless it was cut off for one process to see."""
    settings = {"cache_dir": str(folder), "first_step": "measured"}
    first, second = initialized(llama(), Way(), **settings), initialized(llama(), Way(), **settings)
    if rank() == 0:
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes()[:-8])
    if dist.is_initialized():
        dist.barrier()
    return {"first": first, "second": second, "damaged": initialized(llama(), Way(), **settings)}


def faults() -> dict[str, Any]:
    """What each process raises where one of them fails, and what is left of it."""
    found: dict[str, Any] = {}
    for name, breaks in FAULTS.items():
        model, message = llama(), None
        before = picture(model)
        with pytest.MonkeyPatch.context() as patch:
            breaks(patch)
            try:
                initialized(model, Way(cuts=2), first_step="measured" if name in OF_THE_FIRST_STEP else "gamma")
            except (LoraDAError, Broken) as error:
                message = str(error)
        found[name] = message, differences(before, picture(model))
    return {**found, "afterwards": initialized(llama(), Way())}


def memory() -> dict[str, Any]:
    """One process of several runs out of memory, once, at each place."""
    found = {}
    places = {"borders": (Feed, "hidden"), "pass": (SegmentRun, "_run_top"), "segment": (SegmentRun, "_run_blocks")}
    for name, (owner, method) in places.items():
        with pytest.MonkeyPatch.context() as patch:
            fails_in(patch, owner, method, 1, torch.OutOfMemoryError("no memory left"))
            found[name] = initialized(llama(), Way(cuts=2))
    return found


def dies(folder: Path) -> None:
    """One process fails, nobody catches it; how long the others stay is what the launcher sees."""
    with process_group(), pytest.MonkeyPatch.context() as patch:
        fails_in(patch, SegmentRun, "_run_top", 1, Broken("the fault of one process"))
        (folder / f"began{rank()}").write_text(str(time.time()))
        initialized(llama(), Way())


def trained(folder: Path) -> dict[str, Any]:
    """The adapter that the first training step finds, and what the last leaves, in both kinds of trainers."""
    # what the other cases' processes would take half their time to import
    from datasets import Dataset
    from trainers import FirstStep, plain, sft

    from trl_integration import LoraDAInitializer

    found = {}
    for name in ("Trainer", "SFTTrainer"):
        start, initializer = FirstStep(), LoraDAInitializer(as_solved(samples=SAMPLES))
        settings = {"max_steps": 2, "per_device_train_batch_size": 2}
        if name == "Trainer":
            trainer = plain(llama(), ROWS, folder / name, initializer, start, **settings)
        else:
            rows = Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in ROWS])
            trainer = sft(llama(), rows, folder / name, initializer, start, bf16=False, **settings)
        trainer.train()
        assert initializer.report is not None
        found[name] = {
            "start": start.adapter,
            "end": adapter_weights(trainer.model),
            "processes": trainer.args.world_size,
            "counts": (initializer.report.initialized, initializer.report.samples, initializer.report.tokens),
            "hooks": start.seen["hooks"],
            "requires_grad": start.seen["requires_grad"],
        }
    return found
