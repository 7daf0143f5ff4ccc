"""The learning rate that suits a start, predicted before training: the one whose first step lowers the loss the most.

Adam's first step moves every parameter by the rate against the sign of its gradient, whatever the gradient's size. How
far a rate takes the model therefore depends on the start, and so does the rate that takes it too far. Both need no
training to be seen: one gradient, and the loss at some rates along the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from peft import PeftModel

from benchmarks.quality.heldout import Heldout
from benchmarks.tokenized_rows import Row
from lora_da.samples.rows import collate

STEP = 10**0.25  # a quarter of a decade
FIRST = 1e-3
FARTHEST = 24  # steps from the first rate: six decades


def best_first_step(model: PeftModel, rows: Sequence[Row], batch: int) -> float | None:
    """Find the learning rate of the first Adam step that lowers the rows' loss the most; None if none lowers it.

    Args:
        model: with its adapter started. It is left as it was.
        rows: that the gradient is taken on and the loss measured.
        batch: rows in a backward.
    """
    looked_at = Heldout(sorted(rows, key=lambda row: len(row["input_ids"])), None, model.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = _gradients(model, trained, rows, batch)
    before = [p.detach().clone() for p in trained]

    @torch.no_grad()
    def loss_after(rate: float) -> float:
        for p, start, gradient in zip(trained, before, gradients, strict=True):
            p.copy_(start - rate * gradient.sign())
        return looked_at.measure(model.get_base_model())[0]

    try:
        return lowest(loss_after)
    finally:
        with torch.no_grad():
            for p, start in zip(trained, before, strict=True):
                p.copy_(start)


def lowest(loss_after: Callable[[float], float]) -> float | None:
    """Find where a loss over the rate is lowest: walk downhill in quarter decades, then take the vertex of the parabola
    through the lowest point and its neighbours, over the rate's logarithm. None if it is lowest at a rate of zero."""
    seen: dict[int, float] = {}

    def at(position: int) -> float:
        if position not in seen:
            loss = loss_after(FIRST * STEP**position)
            seen[position] = loss if math.isfinite(loss) else math.inf
        return seen[position]

    position = 0
    while abs(position) < FARTHEST:
        best = min((position, position - 1, position + 1), key=at)
        if best == position:
            break
        position = best
    if not at(position) < loss_after(0.0):
        return None
    left, middle, right = at(position - 1), at(position), at(position + 1)
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature if math.isfinite(curvature) and curvature > 0 else 0.0
    return FIRST * STEP ** (position + shift)


def _gradients(
    model: PeftModel, trained: Sequence[torch.nn.Parameter], rows: Sequence[Row], batch: int
) -> list[torch.Tensor]:
    """Take the gradients of the loss, its mean over batches, in the trained parameters; leave nothing in `.grad`."""
    total = [torch.zeros_like(p) for p in trained]
    batches = [collate(rows[n : n + batch]) for n in range(0, len(rows), batch)]
    for of_batch in batches:
        on_device = {name: value.to(model.device) for name, value in of_batch.items()}
        for sum_, part in zip(total, torch.autograd.grad(model(**on_device).loss, trained), strict=True):
            sum_ += part / len(batches)
    return total
