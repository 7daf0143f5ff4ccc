"""Rows whose loss stands out among those with about as many loss tokens.

A short answer's loss varies more than a long one's, so rows are sorted by their loss tokens and each is compared with
its peers: how many scaled median absolute deviations it is from their median. Neither is moved by a few bad rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_da.findings import Finding, RowLoss

PEERS = 100  # rows that a row is compared with, about
ENOUGH = 20  # rows to tell a usual loss by
NORMAL = 1.4826  # standard deviations of a normal distribution in a median absolute deviation
FURTHEST = 4.0  # standard deviations from the median: one row of a normal distribution in 30,000
UNHELPED = 2.5  # the same of a prompt's help, whose lower tail is short: no less than nothing is to be expected
# What two rows may differ by without standing out, however alike the others are: in log loss, and in nats.
LEAST_LOG, LEAST_HELP = 0.05, 1.0

Numbers = NDArray[np.float64]


def standing_out(losses: Sequence[RowLoss]) -> tuple[list[Finding], str]:
    """Rows with an unusually high mean loss, and rows whose prompt does not help the answer as others' do.

    Args:
        losses: of the rows that were run.

    Returns:
        What was found, and why it cannot be told, if so.
    """
    if len(losses) < ENOUGH:
        return [], f"{len(losses)} rows with different losses are too few to tell a usual one by"
    heights = _among_peers(losses, lambda row: float(np.log(max(row.mean, 1e-9))), LEAST_LOG)
    found = [
        Finding(row.row, "loss", {"loss": row.mean, "deviations": float(height), "loss_tokens": row.loss_tokens})
        for row, height in zip(losses, heights, strict=True)
        if height > FURTHEST
    ]
    with_prompt = [row for row in losses if row.help is not None]
    if len(with_prompt) >= ENOUGH:
        depths = -_among_peers(with_prompt, lambda row: row.help or 0.0, LEAST_HELP)
        found += [
            Finding(row.row, "prompt", {"help": row.help or 0.0, "deviations": float(depth), "loss": row.mean})
            for row, depth in zip(with_prompt, depths, strict=True)
            if depth > UNHELPED
        ]
    return found, ""


def _among_peers(losses: Sequence[RowLoss], figure: Callable[[RowLoss], float], least: float) -> Numbers:
    """How many deviations each row's figure is above the median of its peers, (rows,)."""
    values = np.array([figure(row) for row in losses])
    by_size = np.argsort([row.loss_tokens for row in losses], kind="stable")
    deviations = np.zeros(len(losses))
    for peers in np.array_split(by_size, max(1, len(losses) // PEERS)):
        median = np.median(values[peers])
        spread = NORMAL * np.median(np.abs(values[peers] - median))
        deviations[peers] = (values[peers] - median) / max(spread, least)
    return deviations
