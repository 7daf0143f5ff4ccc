"""Where memory runs out after all: smaller batches or fewer layers at a time, the same result, and nothing lost."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from architectures import ATTENTION, BLOCKS, LLAMA
from collecting import worst
from exhaustion import STAGES, Full, Initialised, at_the_borders, in_a_backward, product_of, while_watching
from models import LAYERS, documents, packed, pad, seeded, with_lora
from peft import PeftModel
from picture import differences, picture
from planning import Forced, Way
from tolerances import REORDERED, TURNED
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

import lora_da.methods.lora_da
from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.collect.sums import SegmentSums
from lora_da.statistics import LayerStatistics

ROWS = documents((9, 14, 6, 11, 7, 13, 8, 10))
BATCHES = [pad(ROWS[:4]), pad(ROWS[4:7]), packed(ROWS[6:])]
CONFIG = LoraDAConfig(samples=9, preset="paper", population_size=1000)
WAYS = {
    "one pass": Way(),
    "2 segments": Way(cuts=2),
    "a segment for each block": Way(cuts=BLOCKS),
    "2 segments in 3 parts": Way(cuts=2, parts=3),
    "2 passes": Way(parts=2, cut=False),
    "one pass, checkpointed": Way(again=True),
    "a segment for each block, one border held": Way(cuts=BLOCKS, borders=3),
    "2 segments, no border held": Way(cuts=2, borders=1),
}
ways = pytest.mark.parametrize("way", WAYS)


def tiny() -> PeftModel:
    return with_lora(LLAMA.base(), r=2, target_modules=[*ATTENTION, "up_proj", "down_proj"])


def initialised(model: PeftModel, way: Way) -> Initialised:
    return Initialised(model, way, BATCHES, CONFIG)


@lru_cache
def undisturbed(way: Way) -> Initialised:
    """What comes out with enough memory, by the way."""
    return initialised(tiny(), way)


def check_undisturbed(found: Initialised, way: Way) -> None:
    """The same statistics and factors as with enough memory, every layer solved once, nothing else changed."""
    expected = undisturbed(way)
    assert sorted(found.solved) == sorted(expected.solved) and len(set(found.solved)) == len(found.solved)
    assert found.report.initialized == found.report.targeted == 6 * BLOCKS
    assert found.changed == expected.changed
    assert worst(found.statistics, expected.statistics) <= REORDERED
    assert found.report.loss == pytest.approx(expected.report.loss, rel=REORDERED)
    for name, product in expected.products.items():
        assert torch.linalg.norm(found.products[name] - product) <= TURNED * torch.linalg.norm(product), name


def check_goes_on(
    way: str,
    lay: Callable[[pytest.MonkeyPatch, PeftModel, Full], Any],
    caplog: pytest.LogCaptureFixture,
    at: int | None = None,
) -> None:
    model = tiny()
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "lora_da"):
        full = Full(patch, at)
        lay(patch, model, full)
        found = initialised(model, WAYS[way])
    assert full.times > 0
    assert sum("out of memory" in record.message for record in caplog.records) == full.times
    check_undisturbed(found, WAYS[way])


def cases() -> list[Any]:
    """No borders are laid down where nothing is cut, or none is held."""
    laid = {way: how.cuts > 1 and how.borders != 1 for way, how in WAYS.items()}
    found = [(way, stage) for way in WAYS for stage in STAGES if laid[way] or stage != "borders"]
    return [pytest.param(*case, id=", ".join(case)) for case in found]


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize(("way", "stage"), cases())
def test_once(way: str, stage: str, call: int, caplog: pytest.LogCaptureFixture) -> None:
    check_goes_on(way, STAGES[stage], caplog, at=call)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("way", "stage"), cases())
def test_while_batches_have_too_many_rows(way: str, stage: str, rows: int, caplog: pytest.LogCaptureFixture) -> None:
    check_goes_on(way, lambda patch, model, full: STAGES[stage](patch, model, full, rows), caplog)


@pytest.mark.slow
@pytest.mark.parametrize("call", [30, 31, 45])
@ways
def test_late_in_the_work(way: str, call: int, caplog: pytest.LogCaptureFixture) -> None:
    """In a later segment or pass, where other layers are solved already."""
    check_goes_on(way, in_a_backward, caplog, at=call)


@pytest.mark.parametrize(("way", "blocks"), [("one pass", 1), ("one pass", 2), ("one pass", 3), ("2 segments", 1)])
def test_while_segments_have_too_many_blocks(way: str, blocks: int, caplog: pytest.LogCaptureFixture) -> None:

    def lay(patch: pytest.MonkeyPatch, model: PeftModel, full: Full) -> None:
        running: list[int] = []

        def used(_module: Any, _args: Any) -> None:
            if torch.is_grad_enabled():
                running.append(1)
                full.used(len(running) > blocks)

        decoder = model.get_base_model().model
        decoder.register_forward_pre_hook(lambda _module, _args: running.clear())
        for block in decoder.layers:
            block.mlp.register_forward_pre_hook(used)

    check_goes_on(way, lay, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 3])
@ways
def test_while_too_many_layers_are_watched(way: str, layers: int, caplog: pytest.LogCaptureFixture) -> None:
    check_goes_on(
        way, lambda patch, _model, full: while_watching(patch, full, lambda names: len(names) > layers), caplog
    )


@ways
def test_one_row_and_one_layer_that_do_not_fit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer solved late in the work: what went before is not written either."""
    model, name = tiny(), f"{LAYERS}.0.mlp.up_proj"
    before = picture(model)
    while_watching(monkeypatch, Full(monkeypatch), lambda names: name in names)
    with pytest.raises(LoraDAError, match=f"out of memory with layer {name} alone and one row"):
        initialize_lora_da_weights(model, BATCHES, CONFIG, show_progress=False, plan=Forced(WAYS[way]))
    assert differences(before, picture(model)) == []


def test_a_block_without_targeted_layers_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    base = LLAMA.base()
    model = with_lora(base, r=2, target_modules=["q_proj"], layers_to_transform=[0, BLOCKS - 1])

    full = Full(monkeypatch)
    base.model.layers[1].mlp.register_forward_pre_hook(lambda _module, _args: full.used(torch.is_grad_enabled()))
    before = picture(model)
    with pytest.raises(LoraDAError, match="out of memory"):
        initialize_lora_da_weights(model, BATCHES, CONFIG, show_progress=False, plan=Forced(Way(cuts=BLOCKS)))
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize("way", ["2 segments", "a segment for each block"])
def test_not_even_the_borders_of_one_row_fit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before = picture(model)
    at_the_borders(monkeypatch, model, Full(monkeypatch), rows=0)
    with pytest.raises(LoraDAError, match="out of memory"):
        initialize_lora_da_weights(model, BATCHES, CONFIG, show_progress=False, plan=Forced(WAYS[way]))
    assert differences(before, picture(model)) == []


class OnGpu:
    """Statistics that say they are on a GPU."""

    device = torch.device("cuda")

    def __init__(self, held: LayerStatistics, asked: list[str]) -> None:
        self.held, self.asked = held, asked

    def gradient_size(self, n_units: float) -> float | None:
        return self.held.gradient_size(n_units)

    def to(self, device: torch.device) -> LayerStatistics:
        self.asked.append(device.type)
        return self.held


@pytest.mark.parametrize("call", [1, 4])
@ways
def test_the_solver_goes_on_on_the_cpu(
    way: str, call: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer that cannot be solved on its GPU is solved on the CPU, the ones after it on the GPU again."""
    expected, full, asked = undisturbed(WAYS[way]), Full(monkeypatch, call), []
    statistics, solve = SegmentSums.take_statistics, lora_da.methods.lora_da.lora_da

    def solved(*args: Any) -> Any:
        full.used()
        return solve(*args)

    monkeypatch.setattr(SegmentSums, "take_statistics", lambda *args: OnGpu(statistics(*args), asked))
    monkeypatch.setattr(lora_da.methods.lora_da, "lora_da", solved)
    model = tiny()
    initialize_lora_da_weights(model, BATCHES, CONFIG, show_progress=False, plan=Forced(WAYS[way]))
    layers = 6 * BLOCKS
    assert asked == ["cuda"] * call + ["cpu"] + ["cuda"] * (layers - call) and full.times == 1
    warned = [r.message for r in caplog.records if "is solved on the CPU" in r.message and r.levelname == "WARNING"]
    assert len(warned) == 1 and "which may take minutes: cuda has no room for it" in warned[0]
    for name, product in expected.products.items():
        assert torch.equal(product_of(model, name), product)


def test_a_second_layer_on_the_cpu_is_not_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full, asked = Full(monkeypatch), list[str]()
    statistics, solve = SegmentSums.take_statistics, lora_da.methods.lora_da.lora_da
    monkeypatch.setattr(SegmentSums, "take_statistics", lambda *args: OnGpu(statistics(*args), asked))
    monkeypatch.setattr(
        lora_da.methods.lora_da, "lora_da", lambda *args: full.used(asked[-1] == "cuda") or solve(*args)
    )
    initialize_lora_da_weights(tiny(), BATCHES, CONFIG, show_progress=False, plan=Forced(Way()))
    assert full.times == 6 * BLOCKS and sum("is solved on the CPU" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("call", [1, 4])
def test_a_solver_without_memory_leaves_the_model(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sums are on the CPU there is nowhere else to go."""
    model, full = tiny(), Full(monkeypatch, call)
    before = picture(model)
    solve = lora_da.methods.lora_da.lora_da
    monkeypatch.setattr(lora_da.methods.lora_da, "lora_da", lambda *args: full.used() or solve(*args))
    with pytest.raises((torch.OutOfMemoryError, LoraDAError), match="memory"):
        initialize_lora_da_weights(model, BATCHES, CONFIG, show_progress=False, plan=Forced(WAYS["2 segments"]))
    assert differences(before, picture(model)) == []


def test_hidden_states_that_are_not_rows_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n hands four hidden states for each row from block to block: a batch of them is halved by its rows."""
    widths = {"head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "laurel_rank": 4}
    kinds = {"layer_types": ["full_attention"] * BLOCKS, "num_kv_shared_layers": 0, "activation_sparsity_pattern": None}
    config = {**LLAMA.config, **widths, **kinds, "intermediate_size": [48] * BLOCKS}
    base = seeded(Gemma3nForCausalLM, Gemma3nTextConfig(**config))
    expected, found = (with_lora(copy.deepcopy(base), r=2, target_modules=ATTENTION) for _ in "ab")
    without = initialised(expected, Way(cuts=2))
    in_a_backward(monkeypatch, found, full := Full(monkeypatch), rows=2)
    assert worst(initialised(found, Way(cuts=2)).statistics, without.statistics) <= REORDERED and full.times
