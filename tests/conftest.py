"""What every test runs under."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Take what importing has made, half a million objects, out of the garbage collector's sight.

    Trainers collect garbage when they begin; over all that this takes longer than a tiny model's training.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give it back: libraries in C++ count what is left when Python ends."""
    gc.unfreeze()
