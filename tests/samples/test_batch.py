"""Batches by tokens: no row is lost, no padding is run, and nothing depends on how the rows are batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import LLAMA
from collecting import worst
from counting import MANY, RANDOM_LAYOUTS
from hypothesis import given
from hypothesis import strategies as st
from models import IGNORED, PADDING, Document, batches, documents, packed, pad, with_lora
from planning import Forced, Way, recorded
from tolerances import REORDERED
from torch import Tensor
from torch.utils.data import DataLoader

import lora_da.samples.draw
from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.samples.batch import Batch, by_length, divided
from lora_da.samples.draw import Size, draw, read_causal
from lora_da.samples.tokens import read_tokens
from lora_da.statistics import LayerStatistics

FIXED = 24  # columns of a collator that pads to one length
ROWS = documents((9, 14, 6, 11, 7, 13, 8, 10, 5, 12))

lengths = st.lists(st.integers(0, 40), max_size=30)


def to_fixed_length(rows: list[Document]) -> dict[str, Tensor]:
    widest = {"input_ids": [PADDING] * FIXED, "labels": [IGNORED] * FIXED}
    batch = pad([*rows, widest])
    batch["attention_mask"][:, -1] = 0
    return {key: value[:-1] for key, value in batch.items()}


@RANDOM_LAYOUTS
@given(lengths, st.integers(1, 100))
def test_rows_are_grouped_by_length_within_the_budget(rows: list[int], batch_tokens: int) -> None:
    groups = by_length(rows, batch_tokens)
    assert sorted(row for group in groups for row in group) == [row for row, n in enumerate(rows) if n]
    of_groups = [[rows[row] for row in group] for group in groups]
    assert [n for group in of_groups for n in group] == sorted((n for n in rows if n), reverse=True)
    for group in of_groups:
        assert len(group) * max(group) <= batch_tokens or len(group) == 1
    for group in of_groups[:-1]:
        assert (len(group) + 1) * group[0] > batch_tokens  # it was full


def batch_of(inputs: dict[str, Any], limit: int = MANY) -> Batch:
    return Batch(inputs, read_tokens(inputs, limit))


def seen(batch: Batch) -> list[tuple[list[int], list[int], int]]:
    """Each counted document's tokens, the targets they predict, and how many carry loss."""
    ids, found = batch.inputs["input_ids"].flatten(), []
    for number in range(batch.tokens.n_documents):
        of = batch.tokens.document == number
        targets = batch.tokens.targets[of].tolist()
        loss_tokens = int(batch.tokens.loss_tokens[number])
        assert loss_tokens == sum(target != -100 for target in targets)
        found.append((ids[of].tolist(), targets, loss_tokens))
    return found


def two_packed_rows() -> dict[str, Tensor]:
    """Rows of several documents each, the first filled up with padding that starts anew."""
    upper, lower = packed(ROWS[:2]), packed(ROWS[2:5])
    missing = lower["labels"].shape[1] - upper["labels"].shape[1]
    assert missing > 0
    fill = {"input_ids": torch.full((1, missing), PADDING), "labels": torch.full((1, missing), IGNORED)}
    fill["position_ids"] = torch.arange(missing)[None]
    return {key: torch.cat([torch.cat([upper[key], fill[key]], 1), lower[key]]) for key in upper}


BATCHES = {
    "padded": pad(ROWS),
    "left padding": pad(ROWS, "left"),
    "fixed length": to_fixed_length(ROWS),
    "packed": packed(ROWS),
    "rows of several documents": two_packed_rows(),
    "positions for all rows": {**pad(ROWS), "position_ids": torch.arange(14)[None]},
    "a flag beside the tensors": {**pad(ROWS), "return_loss": True, "num_items_in_batch": None},
}
layouts = pytest.mark.parametrize("layout", BATCHES)
limits = pytest.mark.parametrize("limit", [1, 4, MANY])


@limits
@layouts
def test_a_trimmed_batch_holds_the_same_documents(layout: str, limit: int) -> None:
    batch = batch_of(BATCHES[layout], limit)
    trimmed = batch.trimmed()
    assert seen(trimmed) == seen(batch)
    assert (trimmed.tokens.document.view(trimmed.shape)[:, -1] >= 0).any()  # the last column counts
    tensors = [value for value in trimmed.inputs.values() if isinstance(value, Tensor)]
    assert {value.shape[1] for value in tensors} == {trimmed.length}


@limits
@layouts
def test_halves_hold_the_same_documents(layout: str, limit: int) -> None:
    batch = batch_of(BATCHES[layout], limit)
    halves = batch.halves()
    if batch.shape[0] == 1:
        assert halves is None
        return
    assert [document for half in halves for document in seen(half)] == seen(batch)
    assert sum(half.shape[0] for half in halves) == batch.shape[0]
    assert abs(halves[0].shape[0] - halves[1].shape[0]) <= 1


@pytest.mark.parametrize("batch_tokens", [1, 20, 50, 10_000])
@limits
@layouts
def test_a_divided_batch_holds_the_same_documents(layout: str, limit: int, batch_tokens: int) -> None:
    batch = batch_of(BATCHES[layout], limit)
    parts = list(divided(batch, batch_tokens))
    assert [document for part in parts for document in seen(part)] == seen(batch)
    for part in parts:
        rows, columns = part.shape
        assert part.tokens.n_documents and (rows * columns <= batch_tokens or rows == 1)


@pytest.mark.parametrize(
    "unknown",
    [
        {"cu_seq_lens_q": torch.tensor([0, 14])},
        {"token_type_ids": torch.zeros(3, 10, 14)},
        {"attention_bias": torch.zeros(10, 1, 14, 14)},
        {"position_ids": torch.arange(10)[:, None]},
    ],
    ids=lambda unknown: next(iter(unknown)),
)
def test_inputs_of_unknown_shapes_leave_a_batch_as_it_is(unknown: dict[str, Any]) -> None:
    inputs = {**to_fixed_length(ROWS), **unknown}
    batch = Batch(inputs, read_tokens(to_fixed_length(ROWS), MANY))
    assert batch.trimmed() is batch and batch.halves() is None and batch.glimpse() is batch
    assert list(divided(batch, 20)) == [batch]


def test_a_glimpse_is_the_beginning_of_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = batch_of(pad(ROWS)).glimpse()
    assert row.shape == (1, len(ROWS[-1]["labels"])) and seen(row) == seen(batch_of(pad(ROWS[-1:])))
    monkeypatch.setattr("lora_da.samples.batch.GLIMPSE", 4)
    assert batch_of(pad(ROWS)).glimpse().inputs["input_ids"].tolist() == [ROWS[-1]["input_ids"][:4]]


def test_what_only_trainers_read_does_not_keep_a_batch_whole() -> None:
    others = {"seq_lengths": [[14]] * 10, "num_items_in_batch": torch.tensor(7)}
    batch = Batch({**to_fixed_length(ROWS), **others}, read_tokens(to_fixed_length(ROWS), MANY))
    assert batch.halves() is not None and batch.trimmed() is not batch


def unmasked(rows: list[Document]) -> dict[str, Tensor]:
    return {k: v for k, v in pad(rows).items() if k != "attention_mask"}


def unknown_width(rows: list[Document]) -> dict[str, Tensor]:
    return {**to_fixed_length(rows), "cache_position": torch.arange(FIXED)}


@pytest.mark.parametrize(
    "collate", [unmasked, lambda rows: pad(rows, "left"), unknown_width], ids=["no mask", "left", "unknown"]
)
def test_rows_are_not_put_together_where_that_would_change_them(
    collate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding that nothing marks, positions that padding moves, and a width that cannot be cut."""
    monkeypatch.setattr("lora_da.samples.draw.BATCH_TOKENS", 60)
    data = draw(DataLoader(ROWS, 4, collate_fn=collate), Size(len(ROWS)), None, None, read_causal, True)
    assert [batch.shape[0] for batch in data.batches] == [1] * len(ROWS)
    assert data.n_tokens == sum(len(row["labels"]) for row in ROWS)


def statistics(data: Any, ran: list[int] | None = None) -> dict[str, LayerStatistics]:
    """Initialise on the first rows of `data`; how many tokens the decoder reads, batch by batch, goes to `ran`."""
    model, planner = with_lora(LLAMA.base()), Forced(Way())

    def note(_module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if ran is not None and torch.is_grad_enabled() and planner.plans:
            ran.append(args[0].shape[0] * args[0].shape[1])

    model.get_base_model().model.layers[0].mlp.register_forward_hook(note)
    config = LoraDAConfig(samples=len(ROWS), preset="paper", averaging="tokens")
    with recorded() as found:
        report = initialize_lora_da_weights(model, data, config, show_progress=False, plan=planner)
    assert (report.samples, report.tokens) == (len(ROWS), sum(len(row["labels"]) for row in ROWS))
    return found


def loader(batch_size: int, collate: Any = pad) -> DataLoader:
    return DataLoader(ROWS, batch_size=batch_size, collate_fn=collate)


@pytest.mark.parametrize("batch_tokens", [1, 20, 40, 100_000])
@pytest.mark.parametrize("collate", [pad, to_fixed_length], ids=["to the longest", "to a fixed length"])
def test_the_batches_do_not_show_in_the_result(
    batch_tokens: int, collate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's batch size, the padding and the tokens of a batch change rounding alone."""
    expected = statistics(batches(ROWS, 1))
    monkeypatch.setattr(lora_da.samples.draw, "BATCH_TOKENS", batch_tokens)
    for data in (loader(1, collate), loader(4, collate), list(loader(4, collate))):
        assert worst(statistics(data), expected) <= REORDERED


@pytest.mark.parametrize("collate", [pad, to_fixed_length], ids=["to the longest", "to a fixed length"])
def test_no_padding_is_run(collate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row not a token of it; and in batches none behind the longest row of each."""
    tokens = sum(len(row["labels"]) for row in ROWS)
    monkeypatch.setattr(lora_da.samples.draw, "BATCH_TOKENS", 1)
    for data in (loader(4, collate), list(loader(4, collate))):
        ran: list[int] = []
        statistics(data, ran)
        assert sum(ran) == tokens and len(ran) == len(ROWS)
    monkeypatch.setattr(lora_da.samples.draw, "BATCH_TOKENS", 28)
    ran = []
    statistics(loader(3, collate), ran)
    assert tokens <= sum(ran) < tokens + len(ROWS) and max(ran) <= 28 and len(ran) < len(ROWS)


def test_rows_of_like_length_are_collated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_da.samples.draw, "BATCH_TOKENS", 28)
    found = draw(loader(3), Size(len(ROWS)), None, None, read_causal, True).batches
    assert [batch.shape for batch in found] == [(2, 14), (2, 12), (2, 10), (3, 8), (1, 5)]


def test_large_batches_are_only_of_rows_that_can_be_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a collator packs into one row stays as small as ever: where a GPU has less room, it could not be cut."""
    monkeypatch.setattr(lora_da.samples.draw, "BATCH_TOKENS", 28)
    monkeypatch.setattr(lora_da.samples.draw, "MOST_BATCH_TOKENS", 60)

    def shapes(collate: Any, large: bool) -> list[tuple[int, int]]:
        size = Size(len(ROWS), large_batches=large)
        return [batch.shape for batch in draw(loader(3, collate), size, None, None, read_causal, True).batches]

    assert max(rows * columns for rows, columns in shapes(pad, True)) in range(29, 61)
    assert shapes(packed, True) == shapes(packed, False)
    assert max(rows * columns for rows, columns in shapes(packed, True)) <= 28
