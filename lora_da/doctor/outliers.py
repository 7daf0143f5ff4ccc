"""Rows whose loss or gradient stands out among those with about as many loss tokens, or whose prompts do not help.

A short answer's loss varies more than a long one's, so rows are sorted by their loss tokens and each is compared with
its peers: how many scaled median absolute deviations it is from their median. Neither is moved by a few bad rows.

A high loss finds text unlike the others'. An answer that belongs to another prompt is usual text, and is told by how
much its prompt lowers its loss, which is about nothing; that says something where nothing is unusual among the peers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_da.findings import Finding, RowLoss
from lora_da.samples.facts import RowFacts

PEERS = 100  # rows that a row is compared with, about
ENOUGH = 20  # rows to tell a usual loss by
NORMAL = 1.4826  # standard deviations of a normal distribution in a median absolute deviation
FURTHEST = 4.0  # of a loss, standard deviations from the median: one row of a normal distribution in 30,000
UNHELPED = 2.5  # the same of a prompt's help, downwards, where the tail is short,
LITTLE = 0.25  # and at most so much of the usual help is left
# What two rows may differ by without standing out, however alike the others are: in log loss, and in nats.
LEAST_LOG, LEAST_HELP = 0.05, 1.0


def standing_out(losses: Sequence[RowLoss]) -> tuple[list[Finding], str]:
    """Rows with an unusually high mean loss, and rows whose prompt does not help the answer as others' do.

    Args:
        losses: of the rows that were run.

    Returns:
        What was found, and why it cannot be told, if so.
    """
    if len(losses) < ENOUGH:
        return [], f"{len(losses)} rows with different losses are too few to tell a usual one by"
    high = _among_peers([_log(row.mean) for row in losses], [row.loss_tokens for row in losses], LEAST_LOG)
    found = [
        Finding(row.row, "loss", {"loss": row.mean, "loss_tokens": row.loss_tokens, "deviations": peers.away})
        for row, peers in zip(losses, high, strict=True)
        if peers.away > FURTHEST
    ]
    helped = [row for row in losses if row.help is not None]
    if len(helped) >= ENOUGH:
        helps = [row.help or 0.0 for row in helped]
        sizes = [row.loss_tokens for row in helped]
        for row, peers in zip(helped, _among_peers(helps, sizes, LEAST_HELP), strict=True):
            unusual = peers.away < -UNHELPED and peers.value < LITTLE * peers.median
            if unusual and peers.median > UNHELPED * peers.spread:
                figures = {"help": peers.value, "usual_help": peers.median, "loss": row.mean}
                found.append(Finding(row.row, "prompt", {**figures, "deviations": peers.away}))
    return found, ""


def with_large_gradients(rows: Sequence[RowFacts], norms: Mapping[int, float]) -> tuple[list[Finding], str]:
    """Rows with an unusually large gradient.

    Args:
        rows: that were read.
        norms: mean norm of the gradient over a row's loss tokens, by row.

    Returns:
        What was found, and why it cannot be told, if so.
    """
    known = [row for row in rows if row.row in norms]
    if len(known) < ENOUGH:
        return [], f"{len(known)} rows whose gradients are known are too few to tell a usual one by"
    among = _among_peers([_log(norms[row.row]) for row in known], [row.loss_tokens for row in known], LEAST_LOG)
    usual = float(np.median([row.loss_tokens for row in known]))
    found = []
    for row, peers in zip(known, among, strict=True):
        # few rows have peers of all sizes, and a mean over fewer tokens varies more
        away = peers.away * min(1.0, (row.loss_tokens / usual) ** 0.5)
        if away > FURTHEST:
            found.append(Finding(row.row, "gradient", {"gradient": norms[row.row], "deviations": away}))
    return found, ""


def _log(value: float) -> float:
    return float(np.log(max(value, 1e-9)))


@dataclass(frozen=True)
class _Among:
    """A row's figure, and the median and spread of its peers'."""

    value: float
    median: float
    spread: float

    @property
    def away(self) -> float:
        """Deviations above the median."""
        return (self.value - self.median) / self.spread


def _among_peers(figures: Sequence[float], loss_tokens: Sequence[int], least: float) -> list[_Among]:
    """Each row among its peers.

    Args:
        figures: of all rows.
        loss_tokens: of all rows.
        least: that a spread is taken for.
    """
    values = np.array(figures)
    by_size = np.argsort(loss_tokens, kind="stable")
    found: dict[int, _Among] = {}
    for peers in np.array_split(by_size, max(1, len(values) // PEERS)):
        median = float(np.median(values[peers]))
        spread = max(least, NORMAL * float(np.median(np.abs(values[peers] - median))))
        found |= {int(row): _Among(float(values[row]), median, spread) for row in peers}
    return [found[row] for row in range(len(values))]
