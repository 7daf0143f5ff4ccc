"""The decoder in segments, a segment in two, and its layers in groups."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, pairwise

from lora_da.adapter import AdapterLayer
from lora_da.collect.forecast import Segment
from lora_da.collect.survey import Survey


def cut(survey: Survey, layers: Sequence[AdapterLayer], cuts: int) -> list[Segment]:
    """The decoder in `cuts` segments of like size, without those below the lowest targeted layer."""
    if cuts == 1:
        return [Segment(0, survey.n_blocks, tuple(layers))]
    n = survey.n_blocks
    inside: list[list[AdapterLayer]] = [[] for _ in range(n)]
    for layer in layers:
        inside[survey.block_of[layer.name]].append(layer)
    borders = sorted({round(k * n / cuts) for k in range(cuts + 1)})
    segments = [Segment(a, b, tuple(chain.from_iterable(inside[a:b]))) for a, b in pairwise(borders)]
    while segments and not segments[0].layers:
        segments.pop(0)
    return segments


def split(segment: Segment, survey: Survey, by_layers: bool) -> tuple[Segment, Segment] | None:
    """A segment in two, for when it was too large after all: by its blocks, or where it is one or asked so, by its
    layers; None where there is one of these only."""
    if not by_layers and segment.stop - segment.first > 1:
        middle = (segment.first + segment.stop) // 2
        below = tuple(layer for layer in segment.layers if survey.block_of[layer.name] < middle)
        above = tuple(layer for layer in segment.layers if survey.block_of[layer.name] >= middle)
        return Segment(segment.first, middle, below), Segment(middle, segment.stop, above)
    if len(segment.layers) < 2:
        return None
    half = len(segment.layers) // 2
    return replace(segment, layers=segment.layers[:half]), replace(segment, layers=segment.layers[half:])


def in_parts(segment: Segment, fits: Callable[[Segment], bool]) -> list[Segment]:
    """A segment's layers in groups that fit, one layer at least in each: the same blocks, run once for each group."""
    parts, rest = list[Segment](), segment.layers
    while rest:
        size = _most(replace(segment, layers=rest), fits)
        parts.append(replace(segment, layers=rest[:size]))
        rest = rest[size:]
    return parts or [segment]


def _most(segment: Segment, fits: Callable[[Segment], bool]) -> int:
    """How many of a segment's first layers fit, one at least, found in few looks: where so many do not, no more do."""

    def too_many(n: int) -> bool:
        return not fits(replace(segment, layers=segment.layers[:n]))

    most, count = 1, len(segment.layers)
    while most < count and not too_many(min(2 * most, count)):
        most = min(2 * most, count)
    return most + bisect_left(range(most + 1, min(2 * most, count) + 1), True, key=too_many)
