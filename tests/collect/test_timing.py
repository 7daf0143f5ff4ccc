"""The stopwatch: what is inside another section is not counted twice, and nothing is lost. No clock is waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import fake_gpus

import lora_da.collect.timing
from lora_da.collect.timing import HELD, Stopwatch

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


@pytest.mark.parametrize("held", [2, 3, 8])
def test_what_is_summed_up_on_the_way_is_not_lost(held: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_da.collect.timing, "HELD", held)
    timed = watch()
    for _ in range(50):
        with timed("backward"):
            clock.wait(1)
            with timed("products"):
                clock.wait(2)
        clock.wait(4)
        assert len(timed._marks) <= held
    assert timed.seconds() == timed.seconds() == {"products": 100, "backward": 50}


@pytest.mark.parametrize("lags", [False, True])
def test_events_are_used_again(lags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sections there are, and nobody waits; while a GPU has not got to them, there are more."""
    with fake_gpus() as gpus:
        made: list[torch.cuda.Event] = []

        class Event(torch.cuda.Event):  # type: ignore[misc]
            def __init__(self, **settings: Any) -> None:
                super().__init__(**settings)
                made.append(self)

            def query(self) -> bool:
                return not lags

        monkeypatch.setattr(torch.cuda, "Event", Event)
        timed = Stopwatch(torch.device("cuda:0"))
        for _ in range(2 * HELD):
            with timed("products"):
                pass
        assert not gpus.waits and len(made) == (4 * HELD if lags else HELD)
        first = timed.seconds()
        assert first.keys() == {"products"} and first["products"] > 0 and timed.seconds() == first
