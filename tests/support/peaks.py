"""Peaks of live bytes on a GPU that is not there, phase by phase, beside what was forecast for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpus
from planning import Forced, Way

import lora_da.collect.schedule
from lora_da.adapter import AdapterLayer
from lora_da.collect.forecast import Forecast, Segment
from lora_da.collect.handover import HandingOver
from lora_da.collect.plan import Plan
from lora_da.collect.segment import SegmentRun
from lora_da.collect.survey import Survey
from lora_da.needs import Needs
from lora_da.processes import Run
from lora_da.samples import Batch

GPU = torch.device("cuda:0")


@dataclass
class Phase:
    """Bytes that one phase was forecast with, and the most that lived in it beside those from before its segment."""

    name: str
    forecast: int
    peak: int


@dataclass
class Peaks:
    """What the phases of a run have taken.

    Args:
        gpus: that count.
        phases: laying borders, running a segment and solving its layers, as they came.
        forecast: of the plan that was made.
    """

    gpus: FakeGpus
    phases: list[Phase] = field(default_factory=list)
    forecast: Forecast | None = None
    _before: int = 0

    def seen(self, name: str, forecast: Callable[[Forecast], int], run: Callable[[], Any], begins: bool = True) -> Any:
        """Run a phase; `begins` a segment, so that what it has summed counts in the next phase too."""
        self._before = self.gpus.live[GPU] if begins else self._before
        torch.cuda.reset_peak_memory_stats(GPU)
        found = run()
        assert self.forecast is not None, "nothing runs before it is planned"
        self.phases.append(Phase(name, forecast(self.forecast), self.gpus.peak[GPU] - self._before))
        return found

    def of(self, name: str) -> list[Phase]:
        return [phase for phase in self.phases if phase.name == name]


class Foreseen(Forced):
    """A planner that runs the samples one way, and keeps the forecast that it plans by."""

    def __init__(self, way: Way, peaks: Peaks) -> None:
        super().__init__(way)
        self._peaks = peaks

    def __call__(
        self, surveyed: Survey, layers: Sequence[AdapterLayer], batches: Sequence[Batch], needs: Needs, run: Run
    ) -> Plan:
        plan = super().__call__(surveyed, layers, batches, needs, run)
        longest = max(b.shape[1] for b in batches)
        masked = max((b.shape[1] for b in batches if b.is_masked()), default=0)
        self._peaks.forecast = Forecast(
            self.way.survey(surveyed),
            plan.batch_tokens,
            longest,
            masked,
            plan.chunk,
            needs,
            plan.checkpointed,
            float("inf"),
        )
        return plan


@contextmanager
def peaks_of(gpus: FakeGpus) -> Iterator[Peaks]:
    """Watch the phases while open."""
    peaks, segments = Peaks(gpus), list[Segment]()
    collect, hand_over, lay = SegmentRun.collect, HandingOver.hand_over, lora_da.collect.schedule.lay

    def running(run: SegmentRun, ran: Any) -> Any:
        segments.append(run._segment)
        return peaks.seen(
            "running", lambda f: f.sums(segments[-1].layers) + f.running(segments[-1]), lambda: collect(run, ran)
        )

    def solving(handing: HandingOver[Any], layers: Any) -> Any:
        return peaks.seen(
            "solving", lambda f: f.solving(segments[-1].layers), lambda: hand_over(handing, layers), begins=False
        )

    def laying(*args: Any) -> Any:
        return peaks.seen("laying", Forecast.laying, lambda: lay(*args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentRun, "collect", running)
        patch.setattr(HandingOver, "hand_over", solving)
        patch.setattr(lora_da.collect.schedule, "lay", laying)
        yield peaks
