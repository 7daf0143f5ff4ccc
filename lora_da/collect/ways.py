"""Ways to run the samples that fit on the device, and the cheapest of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora_da.adapter import AdapterLayer
from lora_da.collect.cuts import cut, in_parts
from lora_da.collect.forecast import Forecast, Segment
from lora_da.collect.keeping import GRADIENTS, cost


@dataclass(frozen=True)
class Way:
    """Segments, and what they are forecast by."""

    needed: Forecast
    segments: Sequence[Segment]

    @property
    def bytes(self) -> int:
        """What it takes of the device."""
        return max(map(self.needed.bytes, self.segments))

    def fits(self, budget: int) -> bool:
        """Whether that is within a budget."""
        return all(self.needed.bytes(part) <= budget for part in self.segments)


def cheapest(layers: Sequence[AdapterLayer], needed: Forecast, budget: int, borders: int) -> Way:
    """The cheapest way that fits; that which takes least where none does.

    Batches are made smaller where not one block fits, and where that does not help, segments are run in parts.

    Args:
        layers: those to be served.
        needed: what the largest batches take.
        budget: bytes of the device.
        borders: for how many there is room on the CPU.
    """

    def costs(way: Way) -> int:
        return cost(way.segments, borders, way.needed.checkpointed)

    survey = needed.survey
    most = survey.n_blocks if borders >= GRADIENTS else min(survey.n_blocks, 1 + borders)
    most = 1 if survey.sequence is None else most
    while True:
        found = [way for kind in _kinds(needed) for way in _fewest(layers, kind, most, budget)]
        if found:
            return min(found, key=costs)
        if needed.batch_tokens <= needed.longest:
            break
        needed = replace(needed, batch_tokens=max(needed.batch_tokens // 2, needed.longest))
    ways = [way for kind in _kinds(needed) for way in _in_parts(layers, kind, most, budget)]
    fitting = [way for way in ways if way.fits(budget)]
    return min(fitting, key=costs) if fitting else min(ways, key=lambda way: way.bytes)


def _kinds(needed: Forecast) -> Iterator[Forecast]:
    """Activations kept, or computed again."""
    yield needed
    if needed.survey.sequence is not None and needed.needs.sums.backward:
        yield replace(needed, checkpointed=True)


def _fewest(layers: Sequence[AdapterLayer], needed: Forecast, most: int, budget: int) -> Iterator[Way]:
    """The fewest segments that fit, if the smallest do."""
    ways = (Way(needed, cut(needed.survey, layers, cuts)) for cuts in (most, *range(1, most + 1)))
    if next(ways).fits(budget):
        yield next(way for way in ways if way.fits(budget))


def _in_parts(layers: Sequence[AdapterLayer], needed: Forecast, most: int, budget: int) -> Iterator[Way]:
    """Some numbers of segments, the layers of each in as few groups as fit."""
    while most:
        whole = cut(needed.survey, layers, most)
        parts = (in_parts(segment, lambda part: needed.bytes(part) <= budget) for segment in whole)
        yield Way(needed, [part for group in parts for part in group])
        most //= 2
