"""Axolotl's features beside LoRA-DA, each trained for real: the adapter at step 0 is that of the PEFT call."""

from __future__ import annotations

import pytest
from tolerances import REBATCHED

pytest.importorskip("axolotl", reason="Axolotl is not installed")

import contextlib
import json
import re

import torch
from axolotl_runs import ROWS, STARTED, Project, difference, preprocess, train
from models import N_PROJECTIONS, PROJECTIONS, documents, tiny_gpt2
from safetensors.torch import load_file
from trainers import sentences

pytestmark = [pytest.mark.axolotl, pytest.mark.slow, pytest.mark.filterwarnings("default")]

HALF = N_PROJECTIONS // 2


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("axolotl"))


@pytest.fixture(scope="module")
def expected(project):
    return project.by_hand()


@pytest.mark.compat("axolotl-checkpointing", "axolotl-batches", "axolotl-training")
@pytest.mark.parametrize(
    "changes",
    [
        {"loraplus_lr_ratio": 16.0, "group_by_length": True, "neftune_noise_alpha": 5.0, "lora_dropout": 0.3},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "selective_checkpointing": True},
        {
            "curriculum_sampling": True,
            "include_tkps": True,
            "dataset_exact_deduplication": True,
            "save_first_step": True,
            "save_strategy": "steps",
            "loss_watchdog_threshold": 100.0,
        },
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"chunked_cross_entropy": True},
    ],
    ids=" ".join,
)
def test_what_leaves_the_loss_alone_changes_nothing(project, expected, changes, request):
    run = project.run(request.node.callspec.id.replace(" ", "-"), **changes)
    assert run.lines() == [STARTED]
    assert run.steps == 1
    assert difference(run.adapter(), expected) < REBATCHED
    assert run.report["population_size"] == ROWS


def with_an_accelerator(config: str) -> None:
    """`axolotl train` where the CPU plays the accelerator that activations are moved away from."""
    from trl.models.activation_offloading import OffloadActivations

    made, init = [], OffloadActivations.__init__

    def on_the_cpu(self, *args, **settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            init(self, *args, **{**settings, "use_pin_memory": False, "use_streams": False})
        self.moved, pack = 0, self.pack_hook

        def noted(tensor):
            self.moved += 1
            return pack(tensor)

        self.pack_hook = noted
        made.append(self)

    OffloadActivations.__init__ = on_the_cpu
    torch.cuda.stream = contextlib.nullcontext
    torch.cuda.current_stream = torch.cuda.default_stream = lambda: None
    torch.cpu.empty_cache = lambda: None
    train(config)
    print("moved", made[0].moved, "left behind", len(made[0].tracker))


@pytest.mark.compat("axolotl-offload")
def test_activations_are_offloaded(project, expected):
    """In training alone, and by its context alone: the plan of the pass keeps its own."""
    offloading = {"gradient_checkpointing": True, "activation_offloading": True}
    ours = project.run("offloaded", with_an_accelerator, **offloading)
    free = project.run("offloaded-plain", with_an_accelerator, plugins=None, lora_da=None, **offloading)
    assert ours.lines() == [STARTED] and free.lines() == []
    assert difference(ours.adapter(), expected) < REBATCHED
    moved, in_training = (
        int(re.findall(r"^moved (\d+) left behind 0$", run.text, re.MULTILINE)[0]) for run in (ours, free)
    )
    assert moved == in_training > 0


@pytest.mark.compat("axolotl-adapter")
@pytest.mark.parametrize(
    ("changes", "lora", "layers"),
    [
        (
            {"peft_layers_to_transform": [1]},
            {"layers_to_transform": [1], "target_modules": PROJECTIONS},
            HALF,
        ),
        (
            {"lora_target_linear": None, "lora_target_modules": ["q_proj", "down_proj"]},
            {"target_modules": ["q_proj", "down_proj"]},
            4,
        ),
        (
            {"peft_use_rslora": True, "lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"o_proj": 3}},
            {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}},
            N_PROJECTIONS,
        ),
        ({"peft_init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}, N_PROJECTIONS),
        (
            {"peft_layer_replication": [[0, 2], [1, 2]]},
            {"layer_replication": [[0, 2], [1, 2]]},
            N_PROJECTIONS + HALF,
        ),
    ],
    ids=["peft_layers_to_transform", "lora_target_modules", "patterns", "gaussian", "peft_layer_replication"],
)
def test_the_adapters_shape(project, changes, lora, layers, request):
    run = project.run(request.node.callspec.id, **changes)
    assert run.lines() == [f"LoRA-DA: initialised {layers} of {layers}"]
    assert difference(run.adapter(), project.by_hand(**lora)) < REBATCHED


@pytest.mark.compat("axolotl-modules-to-save")
def test_modules_to_save_are_trained_beside_the_adapter(project, expected):
    run = project.run("to_save", lora_modules_to_save=["embed_tokens", "lm_head"])
    assert run.lines() == [STARTED]
    assert difference(run.adapter(), expected) < REBATCHED
    saved = load_file(run.output / "adapter_model.safetensors")
    base = project.base().state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        (copy,) = [value for key, value in saved.items() if key.endswith(name)]
        assert torch.equal(copy, base[name]), f"{name} was changed before the first step"


@pytest.mark.compat("axolotl-adapter", "lm-head")
def test_the_head_is_initialised(project):
    run = project.run("head", lora_target_linear=None, lora_target_modules=["q_proj", "lm_head"])
    assert run.lines() == ["LoRA-DA: initialised 3 of 3"]
    assert next(value for name, value in run.adapter().items() if "lm_head.lora_B" in name).any()
    assert difference(run.adapter(), project.by_hand(target_modules=["q_proj", "lm_head"])) < REBATCHED


@pytest.mark.compat("axolotl-adapter")
def test_fan_in_fan_out(tmp_path):
    """GPT-2's layers hold their weights the other way round."""
    project = Project(tmp_path, tiny_gpt2())
    targets = ["c_attn", "c_proj", "c_fc"]
    run = project.run("gpt2", lora_target_linear=None, lora_target_modules=targets, lora_fan_in_fan_out=True)
    assert run.lines() == ["LoRA-DA: initialised 8 of 8"]
    assert difference(run.adapter(), project.by_hand(target_modules=targets, fan_in_fan_out=True)) < REBATCHED


@pytest.mark.compat("axolotl-validation")
def test_the_validation_set_is_held_back(project, expected):
    run = project.run("validated", val_set_size=0.5, eval_strategy="steps", eval_steps=1)
    assert run.lines() == [STARTED]
    assert "'eval_loss'" in run.text
    held = ROWS // 2
    assert (run.report["samples"], run.report["population_size"]) == (held, held)
    assert difference(run.adapter(), project.by_hand(documents(ROWS)[:held])) < REBATCHED
    assert difference(run.adapter(), expected) > 100 * REBATCHED


@pytest.mark.compat("axolotl-preprocess")
def test_preprocessed_data_are_trained_on(project, expected):
    prepared = {"dataset_prepared_path": str(project.folder / "preprocessed")}
    first = project.run("preprocessed", preprocess, **prepared)
    assert first.lines() == [] and "Success! Preprocessed data path" in first.text
    run = project.run("from_prepared", **prepared)
    assert "Loading prepared dataset from disk" in run.text
    assert run.lines() == [STARTED]
    assert difference(run.adapter(), expected) < REBATCHED


@pytest.mark.compat("axolotl-datasets")
def test_several_datasets_are_one_population(project):
    parts = [documents(10, seed=1), documents(20, seed=2)]
    entries = [project.rows(f"part{n}", rows) for n, rows in enumerate(parts)]
    run = project.run("several", datasets=entries)
    assert run.lines() == [STARTED]
    assert run.report["population_size"] == 30
    assert difference(run.adapter(), project.by_hand(parts[0] + parts[1])) < REBATCHED


@pytest.fixture(scope="module")
def texts(project):
    """Streams are tokenised on the way: Axolotl takes no rows of tokens there."""
    path = project.folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(words)}) + "\n" for words in sentences(ROWS)))
    return {"path": str(path), "ds_type": "json", "type": "completion"}


@pytest.fixture(scope="module")
def whole(project, texts):
    """All texts, trained on as an ordinary dataset."""
    run = project.run("whole", lora_da={"samples": ROWS, "first_step": "gamma"}, datasets=[texts])
    assert run.lines() == [STARTED]
    return run


def test_a_stream_needs_its_length(project, texts):
    run = project.run("endless", datasets=[texts], streaming=True)
    assert "the dataset has no length" in run.error() and "(Axolotl: `lora_da.population_size`)" in run.error()
    assert run.steps == 0


BLOCK = {"samples": ROWS, "population_size": ROWS, "first_step": "gamma"}


@pytest.mark.compat("axolotl-streaming")
def test_a_stream_with_its_length_is_served(project, texts, whole):
    run = project.run("streamed", lora_da=BLOCK, datasets=[texts], streaming=True)
    assert run.lines() == [STARTED]
    assert run.report["samples"] == run.report["population_size"] == ROWS
    assert difference(run.adapter(), whole.adapter()) < REBATCHED


@pytest.mark.compat("axolotl-streaming", "axolotl-packing")
@pytest.mark.parametrize("data", ["datasets", "pretraining_dataset"])
def test_a_packed_stream_is_served(project, texts, whole, data):
    """Its rows differ in length and are never collated with each other by the trainer."""
    packing = {"sample_packing": True, "sequence_len": 32, "pad_to_sequence_len": True, "pad_to_multiple_of": None}
    source = {"path": "json", "data_files": texts["path"], "split": "train", "type": "completion"}
    keys = {"datasets": None, data: [source], "streaming": True if data == "datasets" else None}
    run = project.run(f"packed-{data}", lora_da=BLOCK, **packing, **keys)
    assert run.lines() == [STARTED]
    assert run.report["sample_unit"].startswith("document")
    assert run.report["samples"] == ROWS
    assert difference(run.adapter(), whole.adapter()) < REBATCHED
