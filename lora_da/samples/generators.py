"""Random generators that the user's dataset and collator have of their own, left where they were."""

from __future__ import annotations

import contextlib
import functools
import random
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MANY = 64  # items; what is longer is data
FURTHEST = 4096  # objects looked at
GENERATORS = (random.Random, np.random.RandomState, np.random.BitGenerator, torch.Generator)
# The system's own randomness has no state; data, models and plain values hold no generator.
HOLD_NONE = (
    *(random.SystemRandom, type(None), str, bytes, int, float, complex, type, types.ModuleType, Tensor, np.ndarray),
    *(nn.Module, weakref.ProxyType, weakref.CallableProxyType, weakref.ReferenceType),
)


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
        if issubclass(type(value), np.random.Generator):
            value = value.bit_generator  # type: ignore[attr-defined]
        if issubclass(type(value), GENERATORS) and not issubclass(type(value), random.SystemRandom):
            found.append(value)
        else:
            pending += _inside(value)
    return found


def _inside(value: Any) -> list[Any]:
    """What an object holds, as far as a generator may be in it. Nothing of its own code is run."""
    kind = type(value)  # not what it says it is: a proxy of what is gone raises when it is asked
    if issubclass(kind, HOLD_NONE):
        return []
    if issubclass(kind, dict):
        return list(value.values()) if len(value) <= MANY else []
    if issubclass(kind, (list, tuple, set, frozenset)):
        return list(value) if len(value) <= MANY else []
    if issubclass(kind, functools.partial):
        return [value.func, value.args, value.keywords]
    if issubclass(kind, types.MethodType):
        return [value.__self__, value.__func__]
    if issubclass(kind, types.FunctionType):
        cells = (cell for cell in value.__closure__ or () if cell != types.CellType())
        return [value.__defaults__, value.__kwdefaults__, *(cell.cell_contents for cell in cells)]
    return [*_in_slots(value), *getattr(value, "__dict__", {}).values()]


def _in_slots(value: object) -> Iterator[Any]:
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            slot = vars(cls).get(name)
            with contextlib.suppress(AttributeError):  # one that was never set
                if isinstance(slot, types.MemberDescriptorType):
                    yield slot.__get__(value)
