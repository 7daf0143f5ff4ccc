"""Where the time of an initialisation goes, by named section, without waiting for the GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from lora_da.memory import counts_memory

HELD = 2048  # moments: those of some hundred layers in a few batches; a GPU is never so many behind its host for long


class Stopwatch:
    """Sums of seconds by section; an inner section's time is not its outer section's.

    On a GPU they are what it takes between the moments at which sections begin and end, as its stream gets to them.
    These are events; of those that it has passed, all but a number are summed up and used again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if counts_memory(device) else None
        self._open: list[str] = []
        self._marks: list[tuple[str | None, Any]] = []  # the section that begins, and when
        self._spare: list[Any] = []
        self._sums: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Measure what runs inside as part of `section`."""
        self._open.append(section)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def seconds(self) -> dict[str, float]:
        """Seconds by section so far, longest first. Waits for the GPU where there is one."""
        if self._device is not None:
            torch.get_device_module(self._device).synchronize(self._device)
        self._sum_up(len(self._marks) - 1)
        return dict(sorted(self._sums.items(), key=lambda item: -item[1]))

    def _mark(self) -> None:
        if len(self._marks) >= HELD and self._is_passed(self._marks[HELD // 2][1]):
            self._sum_up(HELD // 2)
        self._marks.append((self._open[-1] if self._open else None, self._moment()))

    def _moment(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        gpu = torch.get_device_module(self._device)
        moment = self._spare.pop() if self._spare else gpu.Event(enable_timing=True)
        moment.record(gpu.current_stream(self._device))
        return moment

    def _is_passed(self, moment: Any) -> bool:
        return self._device is None or bool(moment.query())

    def _sum_up(self, count: int) -> None:
        """Sum up what the first moments begin; the next one is the first then."""
        if count <= 0:
            return
        for (section, begin), (_, end) in pairwise(self._marks[: count + 1]):
            if section is not None:
                took = end - begin if self._device is None else begin.elapsed_time(end) / 1000
                self._sums[section] = self._sums.get(section, 0.0) + took
        if self._device is not None:
            self._spare += [moment for _, moment in self._marks[:count]]
        del self._marks[:count]
