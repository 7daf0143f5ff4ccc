"""Which tokens of a batch an expert was given: a module that is called with rows picked from those of its mixture, or a
slice of a parameter that is multiplied with them.

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
    """Where a layer inside an expert belongs: the `mixture` that is called with all tokens, and its `expert`, a module
    in it or a number."""

    mixture: nn.Module
    expert: nn.Module | int


def find_routed(blocks: Sequence[nn.Module], layers: Mapping[str, nn.Module]) -> dict[str, Routed]:
    """Find the layers inside a list of modules within a block of the decoder, by name."""
    name_of = {id(layer): name for name, layer in layers.items()}
    found: dict[str, Routed] = {}
    for mixture in (module for block in blocks for module in block.modules()):
        for experts in mixture.children():
            for expert in experts if isinstance(experts, nn.ModuleList) else ():
                inside = (name_of[id(m)] for m in expert.modules() if id(m) in name_of)
                found |= {name: Routed(mixture, expert) for name in inside}
    return found


class KnownRows:
    """The hidden states (p, h) that a mixture was called with, to find rows in.

    Args:
        rows: the hidden states.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._factors: Tensor | None = None  # (h,) odd, made when they are first needed
        self._sorted: tuple[Tensor, Tensor] | None = None  # fingerprints in order, and where each stands

    def positions_of(self, rows: Tensor) -> Tensor | None:
        """Where each of `rows` (n, h) stands, as positions (n,); None where one is not there."""
        known = self._rows
        if rows.shape[-1] != known.shape[-1] or rows.dtype != known.dtype or len(rows) > len(known):
            return None
        if self._sorted is None:
            ordered, order = self._fingerprints(known).sort(stable=True)
            self._sorted = ordered, order
        ordered, order = self._sorted
        wanted, back = self._fingerprints(rows).sort(stable=True)
        first = torch.searchsorted(wanted, wanted)  # of the equal rows, the first
        slot = torch.searchsorted(ordered, wanted) + torch.arange(len(rows), device=rows.device) - first
        slot = slot.clamp_max(len(known) - 1)
        if not torch.equal(ordered[slot], wanted):
            return None
        found = torch.empty_like(back)
        found[back] = order[slot]
        return found

    def _fingerprints(self, rows: Tensor) -> Tensor:
        """(n,) a 64-bit sum over the bits of each row, equal for equal rows whatever the order of summation."""
        if self._factors is None:
            generator = torch.Generator("cpu").manual_seed(0)
            factors = torch.randint(-(2**62), 2**62, rows.shape[-1:], generator=generator, device="cpu") | 1
            self._factors = factors.to(rows.device)
        bits = rows.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
        return (bits.long() * self._factors).sum(-1)
