"""Random generators that the user's dataset and collator have of their own, left where they were."""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MANY = 64  # items; what is longer is data
FURTHEST = 4096  # objects looked at


@contextlib.contextmanager
def generators_kept(owner: object) -> Iterator[None]:
    """The generators found inside an object are in the state they were in when the context is left.

    Those of random, numpy and torch are found: in attributes, short containers, partial and bound functions and what
    functions enclose, however deep. Other state, a counter or a place in a file, moves on as in any reading.

    Args:
        owner: a dataloader, say.
    """
    restore = [_restorer(generator) for generator in _generators_in(owner)]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _restorer(generator: Any) -> Callable[[], object]:
    """What puts a generator back into its present state."""
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    return functools.partial(setattr, generator, "state", generator.state)


def _generators_in(owner: object) -> list[Any]:
    seen: dict[int, object] = {}  # each is held, so that its number stays its own
    pending, found = [owner], []
    while pending and len(seen) < FURTHEST:
        value = pending.pop(0)
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, np.random.Generator):
            value = value.bit_generator
        if isinstance(value, (random.Random, np.random.RandomState, np.random.BitGenerator, torch.Generator)):
            found.append(value)
        else:
            pending += _inside(value)
    return found


def _inside(value: object) -> list[Any]:
    """What an object holds, as far as a generator may be in it."""
    if value is None or isinstance(value, (str, bytes, int, float, complex, type, types.ModuleType, Tensor, nn.Module)):
        return []
    if isinstance(value, Mapping):
        return list(value.values()) if len(value) <= MANY else []
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value) if len(value) <= MANY else []
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        cells = (cell for cell in value.__closure__ or () if cell != types.CellType())
        return [value.__defaults__, value.__kwdefaults__, *(cell.cell_contents for cell in cells)]
    return list(getattr(value, "__dict__", {}).values())
