"""Which tokens count and whose they are, against a walk over one document after the other."""

from __future__ import annotations

import random

import pytest
import torch
from counting import MANY, RANDOM_LAYOUTS, check, expected, limits, packed_rows, padded, plain_rows, sides
from hypothesis import given
from hypothesis import strategies as st
from models import IGNORED, documents, packed, tiny_llama, with_lora
from settings import as_solved
from tolerances import LOSS

from lora_da import initialize_lora_da_weights
from lora_da.errors import LoraDAError
from lora_da.samples.tokens import read_tokens

pytestmark = pytest.mark.once


class Encoding:
    """Tensors of a batch as collators make them, from rows of documents."""

    def __init__(self, rows, side="right", extra=0):
        self.rows, self.side = rows, side
        self.width = max(sum(map(len, row)) for row in rows) + extra
        self.labels = self.tensor([[label for tokens in row for label in tokens] for row in rows], IGNORED)

    def tensor(self, rows, fill):
        return torch.tensor([padded(row, self.width - len(row), fill, self.side) for row in rows])

    def mask(self):
        return self.tensor([[1] * sum(map(len, row)) for row in self.rows], 0)

    def numbered_mask(self):
        return self.tensor([[i for i, tokens in enumerate(row, 1) for _ in tokens] for row in self.rows], 0)

    def position_ids(self, filling="zeros"):
        rows = [[i for tokens in row for i in range(len(tokens))] for row in self.rows]
        if filling == "zeros":
            return self.tensor(rows, 0)
        missing = [list(range(self.width - len(row))) for row in rows]
        both = [row + more if self.side == "right" else more + row for row, more in zip(rows, missing, strict=True)]
        return torch.tensor(both)

    def seq_idx(self):
        return self.tensor([[i for i, tokens in enumerate(row) for _ in tokens] for row in self.rows], -1)

    def offsets(self):
        ends = [0]
        for row in self.rows:
            ends += [ends[-1] + sum(map(len, row[: i + 1])) for i in range(len(row))]
        return torch.tensor(ends, dtype=torch.int32)

    def expected(self, limit):
        return expected(self.rows, limit, self.width, self.side)


def encodings(e):
    """Every way in which packed rows are told apart, by name."""
    found = {
        "position_ids": {"position_ids": e.position_ids()},
        "position_ids, padding numbered": {"position_ids": e.position_ids("numbers")},
        "position_ids and a mask of ones": {"position_ids": e.position_ids(), "attention_mask": e.mask()},
        "seq_idx": {"seq_idx": e.seq_idx()},
        "multipack": {"attention_mask": e.numbered_mask()},
        "multipack with position_ids": {"attention_mask": e.numbered_mask(), "position_ids": e.position_ids("numbers")},
        "multipack, squashed position_ids": {
            "attention_mask": e.numbered_mask(),
            "position_ids": torch.arange(e.width).expand(len(e.rows), -1),
        },
    }
    if e.side == "right":
        found["seq_lengths"] = {"seq_lengths": [[len(tokens) for tokens in row] for row in e.rows]}
        if len(e.rows) == 1:
            found["cu_seq_lens_q"] = {"cu_seq_lens_q": e.offsets()}
    return {name: {"labels": e.labels, **keys} for name, keys in found.items()}


@RANDOM_LAYOUTS
@given(plain_rows, sides, limits, st.integers(0, 2))
def test_padded_rows(rows, side, limit, extra):
    """A row is a document; its padding counts on neither side."""
    e = Encoding(rows, side, extra)
    tokens = check({"labels": e.labels, "attention_mask": e.mask()}, e.expected(limit), limit)
    assert tokens.boundaries == "row"


@RANDOM_LAYOUTS
@given(packed_rows, sides, limits, st.integers(0, 2))
def test_packed_rows(rows, side, limit, extra):
    """Documents of a packed row are told apart, and no last token predicts the first one of its neighbour."""
    e = Encoding(rows, side, extra)
    for name, batch in encodings(e).items():
        found = read_tokens(batch, limit)
        assert (found.targets.tolist(), found.document.tolist(), found.loss_tokens.tolist()) == e.expected(limit), name


@RANDOM_LAYOUTS
@given(plain_rows, sides, st.integers(0, 2))
def test_rows_that_hold_one_document_each_are_rows(rows, side, extra):
    """The report says `row` where packing keys come with rows that are not packed."""
    e = Encoding(rows, side, extra)
    for filling in ("zeros", "numbers"):
        batch = {"labels": e.labels, "attention_mask": e.mask(), "position_ids": e.position_ids(filling)}
        assert read_tokens(batch, MANY).boundaries == "row"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("position_ids", "position_ids"),
        ("seq_idx", "seq_idx"),
        ("seq_lengths", "seq_lengths"),
        ("cu_seq_lens_q", "cu_seq_lens_q"),
        ("multipack", "attention_mask"),
        ("multipack, squashed position_ids", "attention_mask"),
    ],
)
def test_the_source_of_boundaries_is_named(name, source):
    e = Encoding([[[IGNORED, 5, 6], [IGNORED, 7], [IGNORED, 8, 9]]])
    assert read_tokens(encodings(e)[name], MANY).boundaries == source


def test_one_position_row_serves_all_rows():
    """`position_ids` of shape (1, columns) hold for every row."""
    rows = [[[1, 2, 3], [4, 5]], [[6, 7, 8], [9, 10]]]
    e = Encoding(rows)
    check({"labels": e.labels, "position_ids": e.position_ids()[:1]}, expected(rows, MANY))


def test_rows_without_any_mask():
    """Without a mask and without boundaries every token is real and every row a document."""
    rows = [[[IGNORED, 4, 5]], [[IGNORED, IGNORED, 6]]]
    check({"labels": Encoding(rows).labels}, ([4, 5, IGNORED, IGNORED, 6, IGNORED], [0, 0, 0, 1, 1, 1], [2, 1]))


def test_the_limit_cuts_a_packed_row():
    """Two of four documents are asked for: the third counts no more, the one without loss never did."""
    row = [[IGNORED, 3], [IGNORED, IGNORED], [IGNORED, 4, 5], [IGNORED, 6]]
    batch = encodings(Encoding([row]))["position_ids"]
    wanted = [3, IGNORED, IGNORED, IGNORED, 4, 5, IGNORED, IGNORED, IGNORED], [0, 0, -1, -1, 1, 1, 1, -1, -1], [1, 2]
    check(batch, wanted, limit=2)


def test_padding_never_is_a_target():
    """Where a collator copies padding into the labels, the last real token does not learn to predict it."""
    labels = torch.tensor([[IGNORED, 4, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    check({"labels": labels, "attention_mask": mask}, ([4, 5, *[IGNORED] * 3], [0, 0, 0, -1, -1], [2]))


def test_nothing_carries_loss():
    batch = {"labels": torch.full((2, 4), IGNORED), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    check(batch, ([IGNORED] * 8, [-1] * 8, []))


def test_the_batch_is_not_changed():
    e = Encoding([[[1, 2, 3], [4, 5]], [[6, 7]]])
    batch = {**encodings(e)["multipack with position_ids"], "seq_idx": e.seq_idx()}
    before = {name: tensor.clone() for name, tensor in batch.items()}
    read_tokens(batch, 1)
    assert all(torch.equal(batch[name], before[name]) for name in before)


LABELS = torch.tensor([[IGNORED, 4, 5]])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([LABELS], "a batch is a list, expected a mapping"),
        ({"input_ids": LABELS}, r"no `labels` \(keys seen: input_ids\)"),
        ({"input_ids": LABELS, "labels": None}, "no `labels`"),
        ({"labels": LABELS[0]}, r"`labels` have shape \(3,\)"),
        ({"labels": torch.tensor(1)}, r"`labels` have shape \(\)"),
        ({"labels": LABELS.tolist()}, "`labels` have shape list"),
        ({"labels": LABELS, "attention_mask": torch.ones(1, 1, 3, 3)}, r"`attention_mask` has shape \(1, 1, 3, 3\)"),
        ({"labels": LABELS, "attention_mask": torch.ones(1, 4)}, r"`attention_mask` has shape \(1, 4\)"),
        ({"labels": LABELS, "attention_mask": {"full_attention": torch.ones(1, 1, 3, 3)}}, "`attention_mask` .* dict"),
    ],
)
def test_batches_that_cannot_be_counted(batch, message):
    with pytest.raises(LoraDAError, match=message):
        read_tokens(batch, MANY)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_positions_that_jump_go_on_with_the_document(seed, mask):
    """PoSE makes such; every label but a row's first is in the loss, as the model itself counts."""
    chance = random.Random(seed)
    lengths = [chance.randint(3, 12) for _ in range(4)]
    width = max(lengths)
    positions = torch.zeros(4, width, dtype=torch.long)
    for row, length in zip(positions, lengths, strict=True):
        steps = [chance.choice([1, 1, 1, 2, 50]) for _ in range(length)]
        row[:length] = torch.tensor(steps).cumsum(0) - steps[0]
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    batch = {"labels": torch.where(real, 5, IGNORED), "position_ids": positions, "attention_mask": real.long()}
    if not mask:
        batch = {"labels": batch["labels"][:, : min(lengths)], "position_ids": positions[:, : min(lengths)]}
        lengths = [min(lengths)] * 4
    tokens = read_tokens(batch, MANY)
    assert (tokens.n_documents, tokens.boundaries) == (4, "row")
    assert tokens.loss_tokens.tolist() == [length - 1 for length in lengths]


@pytest.mark.parametrize("jump", [0, 7])
def test_the_loss_is_that_of_training_where_positions_jump(jump):
    model = with_lora(tiny_llama())
    rows = documents((12, 12, 12))
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    batch["position_ids"] = torch.arange(12).expand(3, -1) + jump * (torch.arange(12) >= 5)
    for mask in ({}, {"attention_mask": torch.ones(3, 12, dtype=torch.long)}):
        with torch.no_grad(), model.disable_adapter():
            expected = model(**batch, **mask, use_cache=False).loss.item()
        fresh = with_lora(tiny_llama())
        report = initialize_lora_da_weights(fresh, [{**batch, **mask}], as_solved(samples=3), show_progress=False)
        assert (report.samples, report.loss_tokens) == (3, int((batch["labels"][:, 1:] != IGNORED).sum()))
        assert report.loss == pytest.approx(expected, rel=LOSS) and report.notes == []


def test_a_mask_that_lets_packed_documents_see_each_other_is_noted(caplog):
    batch = packed(documents((6, 7)))
    ones, numbered = torch.ones_like(batch["labels"]), torch.tensor([[1] * 6 + [2] * 7])
    for mask, notes in (({}, 0), ({"attention_mask": ones}, 1), ({"attention_mask": numbered}, 0)):
        caplog.clear()
        model, data = with_lora(tiny_llama()), [{**batch, **mask}]
        report = initialize_lora_da_weights(model, data, as_solved(samples=2), show_progress=False)
        assert report.samples == 2 and len(report.notes) == notes
        said = [record.getMessage() for record in caplog.records if "see each other" in record.getMessage()]
        assert said == [f"LoRA-DA: {note}" for note in report.notes]
