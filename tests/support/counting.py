"""What must be counted in a batch, found by walking over one document after the other; and layouts to try it on."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from models import IGNORED

from lora_da.samples.tokens import read_tokens

MANY = 1000
RANDOM_LAYOUTS = settings(max_examples=150, deadline=None, derandomize=True, database=None)

# A document is the labels of its tokens, a row its documents, in order.
labels = st.one_of(st.just(IGNORED), st.integers(3, 99))
one_document = st.lists(labels, min_size=1, max_size=5)
packed_rows = st.lists(st.lists(one_document, min_size=1, max_size=4), min_size=1, max_size=3)
plain_rows = st.lists(st.lists(one_document, min_size=1, max_size=1), min_size=1, max_size=4)
sides = st.sampled_from(["right", "left"])
limits = st.sampled_from([1, 2, 3, MANY])


def expected(rows, limit, width=None, side="right"):
    """What must be counted: targets and document of each position, loss tokens of each document."""
    width = width or max(sum(map(len, row)) for row in rows)
    targets, owner, loss_tokens = [], [], []
    for row in rows:
        row_targets, row_owner = [], []
        for tokens in row:
            following = tokens[1:]
            carried = sum(label != IGNORED for label in following)
            counts = carried > 0 and len(loss_tokens) < limit
            row_targets += [*following, IGNORED] if counts else [IGNORED] * len(tokens)
            row_owner += [len(loss_tokens) if counts else -1] * len(tokens)
            loss_tokens += [carried] * counts
        filling = width - len(row_owner)
        targets += padded(row_targets, filling, IGNORED, side)
        owner += padded(row_owner, filling, -1, side)
    return targets, owner, loss_tokens


def padded(values, filling, value, side):
    return [*values, *[value] * filling] if side == "right" else [*[value] * filling, *values]


def check(batch, wanted, limit=MANY):
    tokens = read_tokens(batch, limit)
    assert (tokens.targets.tolist(), tokens.document.tolist(), tokens.loss_tokens.tolist()) == wanted
    assert tokens.n_documents == len(wanted[2])
    return tokens
