"""Which rows of a layer's input are the positions that count: it may read a batch row by row or column by column.

Longformer's attention and what was made of fairseq's models hand (columns, rows, i) to layers between others that read
(rows, columns, i). Shapes tell which, but for as many rows as columns and for one flat list; there d tells, which is
zero at positions that do not count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chosen:
    """Rows of an input (…, i), counted through.

    Args:
        indices: of those that count; all of them if None.
        weights: (n,) what each one's d is still to be multiplied by; 1 if None.
        by_column: their indices if the layer reads column by column, where its shape does not tell; else None.
        is_list: whether they stand in one list, (p, i).
    """

    indices: Tensor | None
    weights: Tensor | None = None
    by_column: Tensor | None = None
    is_list: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The rows (n, k) of a tensor (…, k)."""
        rows = tensor.flatten(0, -2)
        return rows if self.indices is None else rows[self.indices.to(rows.device)]


@dataclass(frozen=True)
class Positions:
    """The positions of a stream in one batch.

    Args:
        shape: rows and columns; their number alone where they are in no rows.
        indices: (n,) of those that count, row by row; all of them if None.
    """

    shape: tuple[int, ...]
    indices: Tensor | None

    @staticmethod
    def counted(counts: Tensor, device: torch.device) -> Positions:
        """Those that count (rows, columns) or (n,) bool, their indices on a device."""
        indices = None if counts.all() else counts.flatten().nonzero().flatten().to(device, non_blocking=True)
        return Positions(tuple(counts.shape), indices)

    def __len__(self) -> int:
        return torch.Size(self.shape).numel()

    def by_column(self) -> Tensor:
        """The indices of the same positions, column by column."""
        assert self.indices is not None, "where all count, no order matters"
        rows, columns = self.shape
        return self.indices % columns * rows + self.indices // columns


class Orders:
    """Finds the order in which each layer reads, and remembers it where it was certain once."""

    def __init__(self) -> None:
        self._by_column: dict[str, bool] = {}

    def chosen(self, name: str, positions: Positions, leading: tuple[int, ...]) -> Chosen | None:
        """Which rows of an input count; None where it has another number of them than there are positions.

        Args:
            name: of the layer.
            positions: of the stream that it reads.
            leading: the shape of its input (…, i), without i.
        """
        if torch.Size(leading).numel() != len(positions):
            return None
        if positions.indices is None or len(positions.shape) != 2 or 1 in positions.shape:
            return Chosen(positions.indices)
        rows, columns = positions.shape
        if rows != columns and leading in ((rows, columns), (columns, rows)):
            self._by_column[name] = leading == (columns, rows)
        if name in self._by_column:
            return Chosen(positions.by_column() if self._by_column[name] else positions.indices)
        return Chosen(positions.indices, by_column=positions.by_column(), is_list=len(leading) == 1)

    def settled(self, name: str, chosen: Chosen, d: Tensor | None) -> Chosen | None:
        """The same without doubt; None where nothing tells.

        Args:
            name: of the layer.
            chosen: of `chosen`, in this batch.
            d: the gradient at its output (…, o); None where there is none.
        """
        if chosen.by_column is None:
            return chosen
        by_row, by_column = replace(chosen, by_column=None), Chosen(chosen.by_column)
        fits_rows = fits_columns = True
        if d is not None:
            is_live = d.flatten(0, -2).count_nonzero(-1) > 0
            fits_rows, fits_columns = _all_within(is_live, by_row), _all_within(is_live, by_column)
        if fits_rows != fits_columns:
            self._by_column[name] = fits_columns
            return by_column if fits_columns else by_row
        # Lists are made of rows where no layer is known to read otherwise; some models let padding have a gradient.
        return by_row if chosen.is_list and not any(self._by_column.values()) else None


def _all_within(is_live: Tensor, chosen: Chosen) -> bool:
    """Whether no position (p,) is live but for those chosen."""
    return bool(is_live.sum() == chosen.of(is_live.unsqueeze(-1)).sum())
