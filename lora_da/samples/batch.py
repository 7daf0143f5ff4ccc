"""Batches by tokens: rows of like length together, no padding beyond them, and a batch in two where memory asks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_da.errors import LoraDAError
from lora_da.samples.tokens import IGNORED, BatchTokens

# Tokens in a batch. Beyond about this many, neither the matrix products nor the dequantisation of a layer's weight,
# once a batch, get cheaper by the token; and it is what a training step of one long row reads.
BATCH_TOKENS = 2048
# The same on a GPU, where there is room. Under a few thousand tokens a large layer's weight, dequantised, and its sums,
# read and written, cost as much as its products: they are as large whatever the batch.
MOST_BATCH_TOKENS = 8192
GLIMPSE = 64  # tokens of a row that a model is surveyed with
NOT_TEXT = re.compile(r"pixel_|image_|video_|audio_|input_features|input_values")
NOT_FOR_THE_MODEL = ("seq_lengths", "num_items_in_batch")  # read by trainers and by `tokens`, and done with then
# What layers read: the tokens of the loss (a decoder's, or a model's only ones), an encoder's, or one vector for each
# row of the batch, a pooled hidden state.
TOKENS, ENCODER, ROWS = "tokens", "encoder tokens", "rows"


@dataclass(frozen=True)
class Batch:
    """What the model's forward takes, on the CPU, and which of its tokens count.

    Args:
        inputs: the collator's output.
        tokens: the counted tokens.
        by_row: names of inputs that hold a value or a vector for each row, not for each token.
        rows_of_document: rows that stay together, beside each other.
    """

    inputs: Mapping[str, Any]
    tokens: BatchTokens
    by_row: frozenset[str] = frozenset()
    rows_of_document: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.tokens.rows, self._columns

    @property
    def n_positions(self) -> int:
        """Rows times columns: what is run."""
        return self.shape[0] * self.shape[1]

    @property
    def n_counted(self) -> int:
        """Tokens that count."""
        return int((self.tokens.document >= 0).sum())

    def counted(self) -> Tensor:
        """Which tokens count, (rows, columns) bool."""
        return (self.tokens.document >= 0).view(self.tokens.rows, self._columns)

    def is_square(self) -> bool:
        """Whether it has as many rows as columns, so that a hidden state's shape does not tell one from the other."""
        return self.tokens.rows > 1 and self.tokens.rows == self._columns

    def others(self) -> dict[str, Tensor]:
        """Which of what layers read other than these tokens counts: (n,) bool by stream."""
        return {ROWS: self.counted().any(1)} if self.by_row else {}

    def is_masked(self) -> bool:
        """Whether attention needs a mask of its own, for padding or between the documents of a row."""
        mask = self.inputs.get("attention_mask")
        return self.tokens.boundaries != "row" or (isinstance(mask, Tensor) and not bool((mask == 1).all()))

    def idle(self) -> Batch:
        """The same to run, with nothing in it that counts."""
        tokens = replace(
            self.tokens,
            targets=torch.full_like(self.tokens.targets, IGNORED),
            document=torch.full_like(self.tokens.document, -1),
            loss_tokens=self.tokens.loss_tokens[:0],
            n_found=0,
        )
        return replace(self, tokens=tokens)

    def moves_positions(self) -> bool:
        """Whether its rows begin with padding and nothing says where their text does."""
        mask = self.inputs.get("attention_mask")
        return mask is not None and self.inputs.get("position_ids") is None and bool((mask[:, 0] == 0).any())

    @property
    def length(self) -> int:
        """Columns up to the last token that counts; 1 at least."""
        counted = self.counted().any(0).nonzero()
        return int(counted[-1]) + 1 if len(counted) else 1

    def glimpse(self) -> Batch:
        """Its last document, and of that as many tokens as tell how a model is built; all where it cannot be cut."""
        halves = self.halves()
        return self.beginning(GLIMPSE) if halves is None else halves[1].glimpse()

    def beginning(self, length: int) -> Batch:
        """The first columns; all where it cannot be cut."""
        if length >= self._columns or not self._is_known():
            return self
        inputs = {
            k: v[:, :length] if isinstance(v, Tensor) and k not in self.by_row else v
            for k, v in self._model_inputs.items()
        }
        tokens = selected(self.tokens, self._positions()[:, :length], self.tokens.rows)
        return replace(self, inputs=inputs, tokens=tokens)

    def trimmed(self) -> Batch:
        """Without the columns behind the last token that counts: nothing that counts can see them.

        A batch with inputs of shapes unknown here stays as it is.
        """
        return self.beginning(self.length)

    def halves(self) -> tuple[Batch, Batch] | None:
        """The upper and the lower half of its rows, trimmed; None where it cannot be divided."""
        rows, together = self.tokens.rows, self.rows_of_document
        if rows < 2 * together or not self._is_known():
            return None
        middle = rows // together // 2 * together
        numbers = torch.arange(rows, device=self.tokens.document.device)
        return self._rows(numbers[:middle]).trimmed(), self._rows(numbers[middle:]).trimmed()

    def counted_rows(self) -> Batch:
        """Its rows with a token that counts.

        Raises:
            LoraDAError: it holds others, and inputs of shapes unknown here.
        """
        counted = self.counted().any(1)
        if bool(counted.all()):
            return self
        if not self._is_known():
            raise LoraDAError(
                f"rows without a label, or beyond the number of samples, cannot be left out of a batch of "
                f"{', '.join(self._model_inputs)}; let the batches be made by a DataLoader with a collator"
            )
        kept = self._rows(counted.nonzero().flatten())
        return replace(kept, tokens=replace(kept.tokens, n_found=self.tokens.n_found))

    @property
    def _columns(self) -> int:
        """How many `tokens` have in a row."""
        return len(self.tokens.document) // max(1, self.tokens.rows)

    def _columns_of(self, name: str) -> int:
        """How many an input by token has."""
        return self._columns

    def _positions(self) -> Tensor:
        """(rows, columns), numbered as in `tokens`."""
        return torch.arange(len(self.tokens.document), device=self.tokens.document.device).view(
            self.tokens.rows, self._columns
        )

    def _rows(self, numbers: Tensor) -> Batch:
        """Some of the rows."""
        inputs = {k: v[numbers] if _has_rows(v, self.tokens.rows) else v for k, v in self._model_inputs.items()}
        return replace(self, inputs=inputs, tokens=selected(self.tokens, self._positions()[numbers], len(numbers)))

    def _is_known(self) -> bool:
        """Whether every input is known to be cut by rows, and by columns or not at all."""
        return all(self._is_known_input(k, v) for k, v in self._model_inputs.items())

    def _is_known_input(self, name: str, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return value is None or isinstance(value, (bool, int, float, str))
        if NOT_TEXT.match(name):
            return False  # images may have the shape of tokens
        if name in self.by_row:
            return _has_rows(value, self.tokens.rows)
        columns = self._columns_of(name)
        return value.shape in ((self.tokens.rows, columns), (1, columns))

    @property
    def _model_inputs(self) -> dict[str, Any]:
        return {k: v for k, v in self.inputs.items() if k not in NOT_FOR_THE_MODEL}


def divided(batch: Batch, batch_tokens: int) -> Iterator[Batch]:
    """A batch in parts, none square or of more than `batch_tokens` with its padding, where its rows allow it."""
    rows, columns = batch.shape
    halves = batch.halves() if rows * columns > batch_tokens or batch.is_square() else None
    if halves is None:
        yield batch
        return
    for half in halves:
        if half.tokens.n_documents or not batch.tokens.n_documents:
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


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def selected(tokens: BatchTokens, positions: Tensor, rows: int) -> BatchTokens:
    """The tokens at some positions (rows, columns), their documents numbered anew."""
    positions = positions.flatten()
    document = tokens.document[positions]
    kept = document[document >= 0].unique()
    number = torch.full((tokens.n_documents + 1,), -1, device=document.device)  # the last entry maps -1 to itself
    number[kept] = torch.arange(len(kept), device=document.device)
    return BatchTokens(
        tokens.targets[positions], number[document], tokens.loss_tokens[kept], len(kept), tokens.boundaries, rows
    )
