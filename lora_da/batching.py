"""Batches by tokens: rows of like length together, no padding beyond them, and a batch in two where memory asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da.tokens import IGNORED, BatchTokens

# Tokens in a batch. Beyond about this many, neither the matrix products nor the dequantisation of a layer's weight,
# once a batch, get cheaper by the token; and it is what a training step of one long row reads.
BATCH_TOKENS = 2048
GLIMPSE = 64  # tokens of a row that a model is surveyed with
NOT_FOR_THE_MODEL = ("seq_lengths", "num_items_in_batch")  # read by trainers and by `tokens`, and done with then


@dataclass(frozen=True)
class Batch:
    """What the model's forward takes, on the CPU, and which of its tokens count.

    Args:
        inputs: the collator's output.
        tokens: the counted tokens.
    """

    inputs: Mapping[str, Any]
    tokens: BatchTokens

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.inputs["labels"].shape
        return rows, columns

    @property
    def n_positions(self) -> int:
        """Rows times columns: what is run."""
        return self.shape[0] * self.shape[1]

    @property
    def n_counted(self) -> int:
        """Tokens that count."""
        return int((self.tokens.document >= 0).sum())

    def idle(self) -> Batch:
        """The same to run, with nothing in it that counts."""
        none = torch.full_like(self.tokens.document, -1)
        targets = torch.full_like(self.tokens.targets, IGNORED)
        tokens = BatchTokens(targets, none, self.tokens.loss_tokens[:0], 0, self.tokens.boundaries)
        return Batch(self.inputs, tokens)

    def moves_positions(self) -> bool:
        """Whether its rows begin with padding and nothing says where their text does."""
        mask = self.inputs.get("attention_mask")
        return mask is not None and self.inputs.get("position_ids") is None and bool((mask[:, 0] == 0).any())

    @property
    def length(self) -> int:
        """Columns up to the last token that counts; 1 at least."""
        counted = (self.tokens.document >= 0).view(self.shape).any(0).nonzero()
        return int(counted[-1]) + 1 if len(counted) else 1

    def glimpse(self) -> Batch:
        """Its last row, and of that as many tokens as tell how a model is built; all of it where it cannot be cut."""
        halves = self.halves()
        return self._cut(GLIMPSE) if halves is None else halves[1].glimpse()

    def trimmed(self) -> Batch:
        """Without the columns behind the last token that counts: nothing that counts can see them.

        A batch with inputs of shapes unknown here stays as it is.
        """
        return self._cut(self.length)

    def _cut(self, length: int) -> Batch:
        """The first columns."""
        rows, columns = self.shape
        if length >= columns or not self._is_by_token():
            return self
        inputs = {k: v[:, :length] if isinstance(v, Tensor) else v for k, v in self._model_inputs.items()}
        kept = torch.arange(rows * columns).view(rows, columns)[:, :length].flatten()
        return Batch(inputs, _selected(self.tokens, kept))

    def _is_by_token(self) -> bool:
        rows, columns = self.shape
        return all(_is_by_token(v, rows, columns) for v in self._model_inputs.values())

    @property
    def _model_inputs(self) -> dict[str, Any]:
        return {k: v for k, v in self.inputs.items() if k not in NOT_FOR_THE_MODEL}

    def halves(self) -> tuple[Batch, Batch] | None:
        """The upper and the lower half of its rows, trimmed; None where it cannot be divided."""
        rows, columns = self.shape
        if rows < 2 or not self._is_by_token():
            return None
        positions = torch.arange(rows * columns).view(rows, columns)
        parts = []
        for part in (slice(0, rows // 2), slice(rows // 2, rows)):
            inputs = {k: v[part] if _has_rows(v, rows) else v for k, v in self._model_inputs.items()}
            parts.append(Batch(inputs, _selected(self.tokens, positions[part].flatten())).trimmed())
        return parts[0], parts[1]


def divided(batch: Batch, batch_tokens: int) -> Iterator[Batch]:
    """A batch in parts of at most `batch_tokens`, padding included, where its rows allow it."""
    rows, columns = batch.shape
    halves = batch.halves() if rows * columns > batch_tokens else None
    if halves is None:
        yield batch
        return
    for half in halves:
        if half.tokens.n_documents:
            yield from divided(half, batch_tokens)


def shared(batches: Sequence[Batch], n: int) -> list[list[Batch]]:
    """The batches in `n` shares of like size, the largest first; one that none is left for gets one to run idly."""
    if n == 1:
        return [list(batches)]
    each = -(-sum(b.n_positions for b in batches) // n)
    parts = [part for batch in batches for part in divided(batch, each)]
    shares: list[list[Batch]] = [[] for _ in range(n)]
    for part in sorted(parts, key=lambda b: -b.n_positions):
        min(shares, key=lambda share: sum(b.n_positions for b in share)).append(part)
    shares.sort(key=lambda share: -sum(b.n_positions for b in share))
    return [share or [parts[-1].idle()] for share in shares]


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Groups of rows of like length, the longest first, of at most `batch_tokens` tokens with their padding.

    Args:
        lengths: tokens of each row; rows of none are left out.
        batch_tokens: tokens in a batch; a longer row is a batch of its own.
    """
    groups: list[list[int]] = []
    for row in sorted((r for r, n in enumerate(lengths) if n), key=lambda r: -lengths[r]):
        # the first of a group is its longest
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def _is_by_token(value: Any, rows: int, columns: int) -> bool:
    """Whether a value is known to be cut by columns: (rows, columns), (1, columns), or no tensor and no list."""
    if isinstance(value, Tensor):
        return value.shape in ((rows, columns), (1, columns))
    return value is None or isinstance(value, (bool, int, float, str))


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.shape[0] == rows


def _selected(tokens: BatchTokens, positions: Tensor) -> BatchTokens:
    """The tokens at some positions, their documents numbered anew."""
    document = tokens.document[positions]
    kept = document[document >= 0].unique()
    number = torch.full((tokens.n_documents + 1,), -1)  # the last entry maps -1 to itself
    number[kept] = torch.arange(len(kept))
    return BatchTokens(
        tokens.targets[positions], number[document], tokens.loss_tokens[kept], len(kept), tokens.boundaries
    )
