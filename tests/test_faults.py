"""Whatever goes wrong at whatever stage: the model is as before and the cause is named, or every layer is started."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from faults import NAN, STAGES, Fault, Rows, begin_the_sweep
from judge import truth, worst_start
from models import batches, checkpoint, documents, lived_in, pad, tiny_gpt2, tiny_llama, with_lora
from peft import PeftModel
from picture import differences, picture
from planning import ONE, Forced, Way
from settings import as_solved
from tolerances import START
from torch.utils.data import DataLoader

from lora_da import LoraDAError, initialize_lora_da_weights

ROWS = documents(12)
CONFIG = as_solved(samples=12)
OUT_OF_MEMORY = torch.OutOfMemoryError

RAISED = "it is raised as it is"
DONE = "every layer is started"
NO_LOSS = "the loss of the init samples is nan on the untouched base model; check the data"
NO_SOLUTION = r"layers have no solution; base_model.*: its {} is not finite"

# What must come of a fault, by the stage it strikes at. Where nothing is said, that fault is none of that stage's.
EXPECTED: dict[str, dict[Any, str]] = {
    "row": {OUT_OF_MEMORY: RAISED},
    "collator": {OUT_OF_MEMORY: RAISED},
    "survey": {OUT_OF_MEMORY: RAISED, NAN: DONE},
    "survey, a block alone": {RuntimeError: DONE, OUT_OF_MEMORY: RAISED, NAN: DONE},  # it counts as one that cannot be
    "survey, a block measured": {OUT_OF_MEMORY: RAISED, NAN: DONE},
    "borders": {OUT_OF_MEMORY: DONE, NAN: NO_LOSS},
    "forward": {OUT_OF_MEMORY: DONE, NAN: NO_LOSS},
    "head": {OUT_OF_MEMORY: DONE, NAN: NO_LOSS},
    "backward": {OUT_OF_MEMORY: DONE, NAN: NO_SOLUTION.format("gradient")},
    "sums": {OUT_OF_MEMORY: DONE, NAN: NO_SOLUTION.format("gradient")},
    "means": {OUT_OF_MEMORY: RAISED, NAN: NO_SOLUTION.format("gradient")},
    "solver": {
        OUT_OF_MEMORY: "layer base_model.* does not fit in the CPU's memory to be solved",
        NAN: NO_SOLUTION.format("solution"),
    },
    "layers": {OUT_OF_MEMORY: RAISED},
    "writing": {OUT_OF_MEMORY: RAISED},
}


@dataclass(frozen=True)
class Run:
    """A model, its checkpointing, and how the samples are run through it."""

    way: Way = ONE
    build: Any = tiny_llama
    reentrant: bool | None = None

    def model(self) -> PeftModel:
        model = with_lora(self.build())
        if self.reentrant is not None:
            checkpoint(model.get_base_model(), self.reentrant)
        return lived_in(model)


PASSES = Way(parts=2, cut=False)
RUNS = {
    "one pass": Run(),
    "one pass, GPT-2": Run(build=lambda: tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "streamed": Run(Way(cuts=2)),
    "streamed in parts": Run(Way(cuts=2, parts=3)),
    "passes": Run(PASSES),
    "passes, re-entrant": Run(PASSES, reentrant=True),
    "passes, not re-entrant": Run(PASSES, reentrant=False),
}
QUICK = ("streamed",)
# The first block runs three times before it runs alone, once for the loss to be looked at, and four times afterwards.
CALLS = {"survey": (1, 2, 3), "survey, a block alone": (4,), "survey, a block measured": (5, 8)}


def cases() -> list[Any]:
    found = []
    for run in RUNS:
        for stage, expected in EXPECTED.items():
            if stage == "borders" and RUNS[run].way.cuts == 1:
                continue  # there are none
            for kind, outcome in {RuntimeError: RAISED, KeyboardInterrupt: RAISED, **expected}.items():
                if stage == "forward" and kind == NAN and RUNS[run].reentrant:
                    outcome = NO_SOLUTION.format("gradient")  # its first forward keeps nothing: struck is the second
                name = f"{run}: {kind if isinstance(kind, str) else kind.__name__} in {stage}"
                marks = () if run in QUICK else (pytest.mark.slow,)
                for call in CALLS.get(stage, (1, 3) if run == "streamed" else (3,)):
                    found.append(pytest.param(run, stage, kind, outcome, call, id=f"{name}, {call}", marks=marks))
    return found


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_da.samples.draw.BATCH_TOKENS", 24)  # several batches of these short rows


@lru_cache
def expected_of(run: str) -> Any:
    model = RUNS[run].build()
    return truth(model, ROWS, initialize(with_lora(copy.deepcopy(model))).layers)


def initialize(model: PeftModel, fault: Fault | None = None, stage: str = "", way: Way = ONE) -> Any:
    rows = Rows(ROWS, fault or Fault(RuntimeError, 0), stage)
    return initialize_lora_da_weights(model, rows.loader(), CONFIG, show_progress=False, plan=Forced(way))


@pytest.mark.parametrize(("run", "stage", "kind", "outcome", "call"), cases())
def test_a_fault(run: str, stage: str, kind: Any, outcome: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fault = RUNS[run].model(), Fault(kind, call)
    begin_the_sweep(monkeypatch, fault)
    STAGES[stage](monkeypatch, model, fault)
    before = picture(model)
    if outcome == DONE:
        report = initialize(model, fault, stage, RUNS[run].way)
        assert report.initialized == report.targeted
        written = [f"{name}.lora_{half}.default.weight: bits" for name in report.layers for half in "AB"]
        assert differences(before, picture(model)) == sorted(written)
        assert worst_start(model, report, expected_of(run), len(ROWS)) <= START
    else:
        error, message = (kind, "^midway$") if outcome == RAISED else (LoraDAError, outcome)
        with pytest.raises(error, match=message):
            initialize(model, fault, stage, RUNS[run].way)
        assert differences(before, picture(model)) == []
    assert fault.struck


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_the_next_call_is_not_affected(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a call that was struck, another one gives what it gives on a model that was never touched."""
    fresh, model = (RUNS["streamed"].model() for _ in range(2))
    initialize(fresh, way=Way(cuts=2))
    with monkeypatch.context() as patch:
        fault = Fault(kind, 3)
        begin_the_sweep(patch, fault)
        STAGES["backward"](patch, model, fault)
        with pytest.raises(kind, match="midway"):
            initialize(model, fault, way=Way(cuts=2))
    initialize(model, way=Way(cuts=2))
    expected = dict(fresh.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
def test_a_collator_that_asks_for_a_gpu_that_is_not_there() -> None:
    """What torch says of it reaches the user, from the first row on."""
    model = with_lora(tiny_llama())
    before = picture(model)
    loader = DataLoader(ROWS, 4, collate_fn=lambda rows: {k: v.to("cuda") for k, v in pad(rows).items()})
    with pytest.raises((RuntimeError, AssertionError), match="(?i)cuda|nvidia"):
        initialize_lora_da_weights(model, loader, CONFIG, show_progress=False)
    assert differences(before, picture(model)) == []


def with_input(weight: Any) -> Any:
    """A model whose first attention reads a normed input times `weight` (32,); its projections undo what they can."""
    base = tiny_llama(num_hidden_layers=3)
    block = base.model.layers[0]
    with torch.no_grad():
        block.input_layernorm.weight.copy_(weight)
        for name in "qkv":
            projection = getattr(block.self_attn, f"{name}_proj").weight
            projection /= torch.where(weight == 0, torch.ones(()), weight)
    return base


def one_large_channel() -> Any:
    """A million times the others, as single channels of large models are."""
    return with_input(torch.ones(32).index_fill(0, torch.tensor([5]), 1e6))


def few_directions() -> Any:
    """Only two channels that are not zero: fewer than the rank of 4."""
    return with_input(torch.zeros(32).index_fill(0, torch.tensor([5, 9]), 1.0))


@pytest.mark.parametrize("build", [one_large_channel, few_directions])
def test_inputs_as_no_textbook_has_them(build: Any) -> None:
    """Started, as the oracle says."""
    base = build()
    model = with_lora(copy.deepcopy(base))
    report = initialize(model)
    assert report.initialized == report.targeted == 21
    assert worst_start(model, report, truth(base, ROWS, report.layers), len(ROWS)) <= START
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("preset", ["reference", "paper"])
@pytest.mark.parametrize("build", [one_large_channel, few_directions])
def test_the_same_with_hardly_any_damping(build: Any, preset: str) -> None:
    """Every layer is started, finite, or named with what to set; the rest of the model stays as it is."""
    model = with_lora(build())
    before = picture(model)
    try:
        report = initialize_lora_da_weights(
            model, batches(ROWS, 4), as_solved(preset=preset, samples=12), show_progress=False
        )
    except LoraDAError as error:
        assert "layers have no solution; base_model" in str(error) and "set a larger damping" in str(error)
        assert differences(before, picture(model)) == []
        return
    assert report.initialized + len(report.failed) == report.targeted
    assert all(torch.isfinite(p).all() for p in model.parameters())
    written = {f"{name}.lora_{half}.default.weight: bits" for name in report.layers for half in "AB"}
    assert set(differences(before, picture(model))) == written


def test_a_layer_that_reads_nothing_but_zeros() -> None:
    """It and what reads its output: two of nine are too many to leave."""
    model = with_lora(with_input(torch.zeros(32)), target_modules=["k_proj", "down_proj", "o_proj"])
    before = picture(model)
    with pytest.raises(
        LoraDAError, match=r"2 of 9 layers have no solution; .*0\.self_attn\.k_proj: its input covarianc"
    ):
        initialize(model)
    assert differences(before, picture(model)) == []


def test_a_decomposition_that_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """What LAPACK says of one layer is that layer's reason, and not the end of all others."""
    model, original, calls = with_lora(tiny_llama(num_hidden_layers=3)), torch.linalg.eigh, []

    def eigh(matrix: torch.Tensor) -> Any:
        calls.append(matrix)
        if len(calls) == 4:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    report = initialize(model)
    assert report.initialized == 20 and ["failed to converge" in why for why in report.failed.values()] == [True]
