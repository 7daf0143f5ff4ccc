"""Statistics under every plan: the oracle's, streamed or not, whatever the model, the batches and the checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, BLOCKS, LLAMA, Architecture
from collecting import worst
from models import PREFIX, WIDE, batches, checkpoint, documents, packed, pad, quantized, with_lora
from oracle import OracleStatistics, oracle_statistics
from peft import PeftModel
from planning import ONE, WAYS, Replanned, Way, collected_by
from tolerances import FLOAT32, WRONG
from transformers import PreTrainedModel

from lora_da.adapter import find_adapter
from lora_da.collect.borders import Border

SEVEN_LENGTHS = (9, 14, 6, 11, 7, 13, 8)
ROWS = documents(SEVEN_LENGTHS)

LAYOUTS = {
    "single": lambda rows: batches(rows, 1),
    "padded": lambda rows: [pad(rows[:3]), pad(rows[3:])],
    "left padding": lambda rows: [pad(rows, "left")],
    "packed": lambda rows: [packed(rows[:4]), packed(rows[4:])],
    "large and mixed": lambda rows: [pad(rows[2:]), packed(rows[:2])],
}


@lru_cache
def base_of(name: str) -> PreTrainedModel:
    return ARCHITECTURES[name].base()


def fresh(name: str) -> PeftModel:
    """An adapter on a copy: the base stays as the oracle wants it."""
    return ARCHITECTURES[name].model(copy.deepcopy(base_of(name)))


@lru_cache
def truth(name: str, averaging: str) -> dict[str, OracleStatistics]:
    names = [layer.name.removeprefix(PREFIX) for layer in find_adapter(fresh(name)).layers]
    return oracle_statistics(base_of(name), ROWS, names, averaging)


@pytest.mark.compat("llama")
@pytest.mark.parametrize(
    "reentrant",
    [
        pytest.param(None, id="kept"),
        pytest.param(True, id="re-entrant", marks=pytest.mark.slow),
        pytest.param(False, id="not re-entrant", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_every_plan_gives_the_oracles_statistics(way: str, layout: str, reentrant: bool | None) -> None:
    for averaging in ("samples", "tokens"):
        model = fresh("Llama")
        if reentrant is not None:
            checkpoint(model.get_base_model(), reentrant)
        ours = collected_by(model, LAYOUTS[layout](ROWS), WAYS[way], averaging)
        assert worst(ours, truth("Llama", averaging)) <= FLOAT32
        assert {s.n_tokens for s in ours.values()} == {sum(SEVEN_LENGTHS)}


@pytest.mark.compat("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt-neox", "mixtral", "qwen-moe")
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("way", ["one pass", "a segment for each block", "3 passes"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != LLAMA.name])
def test_every_architecture_gives_the_oracles_statistics(name: str, way: str, layout: str) -> None:
    """`collected_by` makes sure that it really was streamed."""
    ours = collected_by(fresh(name), LAYOUTS[layout](ROWS), WAYS[way])
    assert worst(ours, truth(name, "tokens")) <= FLOAT32


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Gemma2", "Gemma3Text"])
def test_the_window_is_shorter_than_the_documents(name: str) -> None:
    """Negative control: with a window that reaches everywhere, the same weights give other statistics."""
    everywhere = replace(ARCHITECTURES[name], config={**ARCHITECTURES[name].config, "sliding_window": 256})
    ours = collected_by(everywhere.model(everywhere.base()), [pad(ROWS)], Way(cuts=BLOCKS))
    assert worst(ours, truth(name, "tokens")) > WRONG


def shifted(self: Border, number: int, following: int | None = None) -> torch.Tensor:
    """The next batch's tensor."""
    return self._fetch((number + 1) % len(self._held))


def zeros(self: Border, number: int, following: int | None = None) -> torch.Tensor:
    return torch.zeros_like(self._fetch(number))


def scaled(self: Border, number: int, following: int | None = None) -> torch.Tensor:
    """Gradients 1 % too large; hidden states are far larger than any gradient."""
    held = self._fetch(number)
    return held * 1.01 if self.holds_gradients else held


@pytest.mark.parametrize("wrong", [shifted, zeros, scaled])
def test_a_wrong_border_shows(wrong: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: refused, or off from the truth."""
    rows = documents((9, 9, 9, 9))
    names = list(truth("Llama", "tokens"))
    expected = oracle_statistics(base_of("Llama"), rows, names, "tokens")
    assert worst(collected_by(fresh("Llama"), batches(rows, 1), Way(cuts=2)), expected) <= FLOAT32

    def put(self: Border, number: int, tensor: torch.Tensor) -> None:
        self.holds_gradients = torch.is_grad_enabled()  # hidden states are laid down without
        original(self, number, tensor)

    original = Border.put
    monkeypatch.setattr(Border, "put", put)
    monkeypatch.setattr(Border, "get", wrong)
    try:
        ours = collected_by(fresh("Llama"), batches(rows, 1), Way(cuts=2))
    except Replanned:
        return
    assert worst(ours, expected) > 100 * FLOAT32


IN_FLOAT32 = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one pass"])
@pytest.mark.parametrize("kind", IN_FLOAT32)
def test_a_quantised_model_gives_the_same_under_every_plan(tmp_path: Path, kind: str, way: str) -> None:
    """The same batches in the same order: a forward run again is the same to the last bit, int8's rounding too."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    wide = Architecture("Llama", {**LLAMA.config, **WIDE}).base()
    base = quantized(wide, tmp_path, **IN_FLOAT32[kind])
    data = [pad(ROWS[:3]), packed(ROWS[3:])]
    one, other = (collected_by(with_lora(copy.deepcopy(base)), data, w) for w in (ONE, WAYS[way]))
    assert worst(other, one) <= FLOAT32
