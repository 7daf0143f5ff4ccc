"""Where the time of an initialisation goes, by named section, without waiting for the GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch


class Stopwatch:
    """Sums of seconds by section; an inner section's time is not its outer section's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._open: list[str] = []
        self._marks: list[tuple[str | None, Any]] = []  # the section that begins, and when

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
            torch.cuda.synchronize(self._device)
        sums: dict[str, float] = {}
        moments = [(section, self._seconds_of(moment)) for section, moment in self._marks]
        for (section, begin), (_, end) in pairwise(moments):
            if section is not None:
                sums[section] = sums.get(section, 0.0) + end - begin
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def _mark(self) -> None:
        if self._device is None:
            moment: Any = time.perf_counter()
        else:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self._device))
        self._marks.append((self._open[-1] if self._open else None, moment))

    def _seconds_of(self, moment: Any) -> float:
        if self._device is None:
            return float(moment)
        return float(self._marks[0][1].elapsed_time(moment)) / 1000
