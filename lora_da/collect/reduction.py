"""Sums over the processes: each layer's are with one of them then, its owner."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_da.collect.sums import SegmentSums
from lora_da.processes import Processes

Shape = tuple[str, int, int, torch.dtype]  # the layer whose input is shared; o, i and the dtype of the sums


def reduce(sums: SegmentSums, processes: Processes, device: torch.device) -> None:
    """Sum over the processes, in place. Counts are with all of them afterwards, sums with their owners alone.

    Args:
        sums: this process's.
        processes: all of them call this, for the same layers.
        device: where the sums are.
    """
    if processes.size == 1:
        return
    shapes, tokens = _seen_anywhere(sums, processes)
    costs: dict[str, float] = {}
    for source, o, i, _ in shapes.values():
        costs[source] = costs.get(source, i**3) + o * i**2
    owners = processes.owners(costs)

    def reduced(value: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """The sum of a tensor over the processes, in its owner."""
        value = like.new_zeros(shape) if value is None else value
        processes.sum_to(owner, value)
        return value if processes.rank == owner else None

    for name in (name for name in sums.inputs if name in shapes):  # in the same order everywhere
        source, o, i, dtype = shapes[name]
        like, owner, taken = torch.empty(0, dtype=dtype, device=device), owners[source], sums.needs.sums
        sums.reads_like[name], sums.owner[name] = source, owner
        inputs = sums.inputs[source]
        if name == source:
            inputs.n_tokens = tokens[source]
            if taken.input_cov:
                inputs.sigma_xx_ = reduced(inputs.sigma_xx_, (i, i))
        of_layer = sums.of(name)
        of_layer.shape = (o, i, dtype)
        if taken.grad:
            of_layer.sigma_dx_ = reduced(of_layer.sigma_dx_, (o, i))
        if taken.output_fisher:
            of_layer.sigma_dd_ = reduced(of_layer.sigma_dd_, of_layer.fisher_shape(o))
        if owner != processes.rank:
            del sums.by_layer[name]


def _seen_anywhere(sums: SegmentSums, processes: Processes) -> tuple[dict[str, Shape], dict[str, int]]:
    """What the processes have seen together: shapes of layers, and tokens by layer; misshapen inputs are noted."""
    seen = {n: (sums.reads_like[n], *held.shape) for n, held in sums.by_layer.items() if held.shape is not None}
    counts = {name: inputs.n_tokens for name, inputs in sums.inputs.items()}
    own = (seen, counts, sums.misshapen)
    shapes: dict[str, Shape] = {}
    tokens = dict.fromkeys(sums.inputs, 0)
    for others_seen, others_counts, misshapen in [own] if processes.sharded else processes.gathered(own):
        shapes |= others_seen
        sums.misshapen |= misshapen
        for name, n in others_counts.items():
            tokens[name] += n
    return shapes, tokens
