"""Which hidden states are held while segments are served from the last to the first, and what that costs.

Where all borders have room, one forward leaves them all. Where they have not, some are held, and what enters a segment
between two of them is made again, batch by batch, by running the blocks below it once more without gradients. As the
work comes down, what was held above is dropped, and borders further down are laid in its place. Where they lie so that
the fewest blocks are run again is known (Griewank and Walther, Revolve, ACM TOMS 26, 2000): with s of them held, the
lowest included, and no block run forward more than r times, (s + r choose s) segments can be served.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count

from lora_da.collect.forecast import Segment

GRADIENTS = 2  # borders' worth beside the hidden states: the gradients above a segment, and those below as they come
# What a token costs in a block, counted in forwards through it: its own; the gradients in its inputs, its weights being
# frozen; Σ d xᵀ, as many products as a forward, and Σ x xᵀ, about as many.
FORWARD, BACKWARD, PRODUCTS = 1, 1, 2


@dataclass(frozen=True)
class Walk:
    """All segments of a plan, served from the last to the first.

    Args:
        forwards: blocks that are run without gradients, to lay borders and to get from one to a segment; the same block
            counts as often as it is run.
        held: borders' worth of hidden states and gradients that are kept at once, at most.
    """

    forwards: int
    held: int


def walk(segments: Sequence[Segment], borders: int) -> Walk:
    """What becomes of segments, the lowest first, with room for so many borders."""
    pending, held, most, forwards = list(segments), set[int](), 0, 0
    top = max(s.stop for s in segments)
    while pending:
        segment = pending.pop()
        laid = to_lay(segment, pending, held, borders, segment.stop == top)
        forwards += laid[-1] - _nearest(segment.first, held) if laid else 0
        held |= set(laid)
        forwards += segment.first - _nearest(segment.first, held)
        below = any(s.first < segment.first for s in pending)
        most = max(most, len(held) + below + (segment.stop < top))
        if not any(s.first == segment.first for s in pending):
            held = {border for border in held if border < segment.first}
    return Walk(forwards, most)


def cost(segments: Sequence[Segment], borders: int, checkpointed: bool) -> int:
    """What a token costs in all, in forwards through one block, where gradients are taken.

    Args:
        segments: the lowest first; blocks that are in several are run for each.
        borders: how many there is room for.
        checkpointed: whether segments compute the activations of each block again.
    """
    run = sum(s.stop - s.first for s in segments)
    served = sum(stop - first for first, stop in {(s.first, s.stop) for s in segments})
    of_a_run = FORWARD * (1 + checkpointed) + BACKWARD
    return FORWARD * walk(segments, borders).forwards + of_a_run * run + PRODUCTS * served


def to_lay(
    segment: Segment, pending: Sequence[Segment], held: Collection[int], borders: int, is_top: bool
) -> list[int]:
    """The borders to lay before a segment is served, in one forward from the nearest that is held below it.

    Args:
        segment: the next to be served.
        pending: those that follow, all at or below it.
        held: numbers of the blocks whose input is held.
        borders: how many there is room for, gradients included.
        is_top: whether there is no gradient yet.
    """
    start = _nearest(segment.first, held)
    between = sorted({s.first for s in (*pending, segment) if s.first > start})
    if not between:
        return []
    room = borders - GRADIENTS - len(held)
    # Beside the topmost segment there are the gradients below only, and its own border goes before there are more.
    own = [between.pop()] if is_top and not held and room >= 0 else []
    return [between[number - 1] for number in places(len(between) + 1, room)] + own


def places(n: int, room: int) -> list[int]:
    """Before which of `n` segments, counted from 0 at the lowest, what enters is held, so that least is run again.

    What enters the lowest is held already; the others there is `room` for.
    """
    found, place = [], 0
    while room > 0 and n > 1:
        step = _step(n, room + 1)
        place, n, room = place + step, n - step, room - 1
        found.append(place)
    return found


def _step(n: int, held: int) -> int:
    """How many of n > 1 segments lie below the next border that is held, the lowest border among those `held`."""
    times = next(r for r in count(1) if math.comb(held + r, held) >= n)
    fewest = math.comb(held + times - 2, held) if times > 1 else 1
    return max(1, fewest, n - math.comb(held - 1 + times, held - 1))


def _nearest(first: int, held: Collection[int]) -> int:
    return max((border for border in held if border <= first), default=0)
