"""Which borders are held where the CPU has no room for all: those with which the fewest blocks are run again."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import pytest
from collecting import worst
from models import batches, documents, tiny_llama, with_lora
from planning import ONE, Way, collected_by
from tolerances import FLOAT32
from torch import is_grad_enabled

from lora_da.collect.forecast import Segment
from lora_da.collect.keeping import GRADIENTS, cost, places, walk

BLOCKS = 7
DOCUMENTS = documents(4)


def singles(n: int) -> list[Segment]:
    return [Segment(block, block + 1, ()) for block in range(n)]


@lru_cache
def least(n: int, room: int) -> int:
    """Blocks run again to serve `n` of them from what enters the lowest: every place of the first border tried."""
    if n < 2:
        return 0
    if room == 0:
        return sum(range(n))
    return min(p + least(n - p, room - 1) + least(p, room) for p in range(1, n))


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 40])
def test_no_other_places_run_fewer_blocks(room: int) -> None:
    """Compared with every way to place them; the topmost segment's own border is beside the others."""
    for n in range(3, 41):
        forwards = walk(singles(n), room + GRADIENTS).forwards
        below = n - 1  # the segments that are served after the topmost, once a forward has come to it
        first = places(below, room)
        expected = least(below, room) + below - (first[-1] if first else 0)
        assert forwards == expected, n


@pytest.mark.parametrize("borders", range(2, 12))
def test_no_more_is_held_than_there_is_room_for(borders: int) -> None:
    for n in range(2, 41):
        found = walk(singles(n), borders)
        assert found.held == min(n, borders)
        assert found.forwards >= n - 1 and (found.forwards == n - 1) == (borders >= n)


def test_what_a_token_costs() -> None:
    whole = [Segment(0, 8, ())]
    assert cost(whole, 0, False) == 8 * (1 + 1 + 2)
    assert cost(whole, 0, True) == 8 * (2 + 1 + 2)
    assert cost(2 * whole, 0, False) == 8 * (2 * (1 + 1) + 2)
    assert cost(singles(8), 8, False) == 8 * 4 + 7  # a forward to the highest border
    assert cost(singles(8), 2, False) == 8 * 4 + sum(range(8))  # from the decoder's own input, for each


@pytest.mark.parametrize("borders", [2, 3, 4, 9])
def test_the_model_runs_as_often_as_was_planned(borders: int) -> None:
    """Counted at the blocks; and what comes out is what one pass gives."""
    model, ran = with_lora(tiny_llama(num_hidden_layers=BLOCKS)), Counter[bool]()
    expected = collected_by(model, batches(DOCUMENTS, 2), ONE)
    for block in model.get_base_model().model.layers:
        block.mlp.register_forward_pre_hook(lambda _module, _args: ran.update([is_grad_enabled()]))
    collected_by(model, batches(DOCUMENTS, 2), ONE)
    in_the_survey, own = ran[False], ran[True]
    ran.clear()
    found = collected_by(model, batches(DOCUMENTS, 2), Way(cuts=BLOCKS, borders=borders))
    assert worst(found, expected) <= FLOAT32
    assert ran[True] == own
    runs = own // BLOCKS - 1  # of the batches, and one of the survey with gradients
    assert ran[False] - in_the_survey == walk(singles(BLOCKS), borders).forwards * runs
