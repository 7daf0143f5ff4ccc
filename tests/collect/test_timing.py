"""The stopwatch: what is inside another section is not counted twice, and nothing is lost. No clock is waited for."""

from __future__ import annotations

import pytest
import torch

import lora_da.collect.timing
from lora_da.collect.timing import Stopwatch

pytestmark = pytest.mark.once


class Clock:
    """Moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(lora_da.collect.timing.time, "perf_counter", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def watch() -> Stopwatch:
    return Stopwatch(torch.device("cpu"))


def test_an_inner_section_is_not_its_outer_ones(clock: Clock) -> None:
    timed = watch()
    with timed("backward"):
        clock.wait(1)
        with timed("products"):
            clock.wait(2)
            with timed("copies"):
                clock.wait(4)
            clock.wait(8)
        clock.wait(16)
    assert timed.seconds() == {"backward": 17, "products": 10, "copies": 4}


def test_sections_sum_to_the_time_inside_them(clock: Clock) -> None:
    """Time between sections is nobody's; a section that returns goes on where it was."""
    timed = watch()
    for _ in range(3):
        clock.wait(100)
        with timed("forward"):
            clock.wait(1)
            with timed("forward"):
                clock.wait(2)
        with timed("solve"):
            clock.wait(5)
    assert timed.seconds() == {"solve": 15, "forward": 9}
    assert sum(timed.seconds().values()) == 3 * 8


def test_the_longest_comes_first(clock: Clock) -> None:
    timed = watch()
    for section, seconds in (("forward", 1), ("solve", 3), ("copies", 2)):
        with timed(section):
            clock.wait(seconds)
    assert list(timed.seconds()) == ["solve", "copies", "forward"]


def test_an_error_ends_its_section(clock: Clock) -> None:
    timed = watch()
    with timed("backward"):
        with pytest.raises(RuntimeError), timed("products"):
            clock.wait(1)
            raise RuntimeError("midway")
        clock.wait(2)
    clock.wait(4)
    assert timed.seconds() == {"backward": 2, "products": 1}


def test_nothing_measured() -> None:
    assert watch().seconds() == {}
