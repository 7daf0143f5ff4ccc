"""Which tokens of a batch an expert was given, where experts are ordinary modules called with rows picked from theirs.

An expert reads rows of the hidden state that its mixture was called with; nothing tells which. But the rows are copies,
so their bits find them. Rows that are alike in every bit are routed alike, all of them, and are taken in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routed:
    """Where a layer inside an expert belongs: the `mixture` that is called with all tokens, and its `expert`."""

    mixture: nn.Module
    expert: nn.Module


def find_routed(blocks: Sequence[nn.Module], layers: Mapping[str, nn.Module]) -> dict[str, Routed]:
    """Of some layers, those inside a list of modules within a block of the decoder, by name."""
    name_of = {id(layer): name for name, layer in layers.items()}
    found: dict[str, Routed] = {}
    for mixture in (module for block in blocks for module in block.modules()):
        for experts in mixture.children():
            for expert in experts if isinstance(experts, nn.ModuleList) else ():
                inside = (name_of[id(m)] for m in expert.modules() if id(m) in name_of)
                found |= {name: Routed(mixture, expert) for name in inside}
    return found


def positions_of(rows: Tensor, among: Tensor) -> Tensor | None:
    """Where each of `rows` (n, h) stands in `among` (p, h), as positions (n,); None where one is not there."""
    if rows.shape[-1] != among.shape[-1] or rows.dtype != among.dtype or len(rows) > len(among):
        return None
    wanted, known = _fingerprints(rows), _fingerprints(among)
    ordered, position = known.sort(stable=True)
    sorted_wanted, back = wanted.sort(stable=True)
    first = torch.searchsorted(sorted_wanted, sorted_wanted)  # of the equal rows, the first
    slot = torch.searchsorted(ordered, sorted_wanted) + torch.arange(len(rows), device=rows.device) - first
    slot = slot.clamp_max(len(among) - 1)
    if not torch.equal(ordered[slot], sorted_wanted):
        return None
    found = torch.empty_like(back)
    found[back] = position[slot]
    return found


def _fingerprints(rows: Tensor) -> Tensor:
    """(n,) a 64-bit sum over the bits of each row, equal for equal rows whatever the order of summation."""
    bits = rows.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    generator = torch.Generator("cpu").manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator) | 1
    return (bits.long() * factors.to(rows.device)).sum(-1)
