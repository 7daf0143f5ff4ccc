"""The device's peak memory in each phase of an estimate, beside what was forecast for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader

from lora_da.adapter import AdapterLayer, find_adapter
from lora_da.collect import collect
from lora_da.collect.forecast import Forecast
from lora_da.collect.handover import Observed
from lora_da.collect.plan import Plan, in_segments
from lora_da.collect.survey import Survey
from lora_da.memory import GIB, used_bytes
from lora_da.methods import METHODS
from lora_da.model.state import drawing_mode, estimation_mode
from lora_da.needs import Needs
from lora_da.processes import Processes, Run
from lora_da.samples.batch import Batch
from lora_da.samples.draw import Size, draw
from lora_da.solve import LayerSolver
from lora_da.tasks import find_task

LAYING, RUNNING, SOLVING = "laying", "running", "solving"


class Peaks:
    """Looks at memory from one phase to the next; on a CPU, at what the process holds as a phase ends.

    Attributes:
        phases: each with its peak in bytes, in their order.
    """

    def __init__(self, device: torch.device) -> None:
        self.phases: list[tuple[str, int]] = []
        self._device, self._phase = device, ""

    def begin(self, phase: str) -> None:
        """End the phase before; nothing happens where this one lasts already."""
        if phase == self._phase:
            return
        self.end()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._phase = phase

    def end(self) -> None:
        if self._phase:
            on_gpu = self._device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else used_bytes(self._device)
            self.phases.append((self._phase, peak))
        self._phase = ""

    def highest(self, phase: str) -> int:
        return max((peak for name, peak in self.phases if name == phase), default=0)


@dataclass
class Watched:
    """A planner of one segment for each block that keeps what it has planned.

    Args:
        peaks: told when planning is over.
        forecasts: of running and of solving, in bytes beyond those in use, of each segment, the topmost first.
    """

    blocks: int
    peaks: Peaks
    forecasts: list[dict[str, int]] = field(default_factory=list)

    def __call__(
        self, survey: Survey, layers: Sequence[AdapterLayer], batches: Sequence[Batch], needs: Needs, run: Run
    ) -> Plan:
        plan = in_segments(self.blocks)(survey, layers, batches, needs, run)
        longest = max(batch.shape[1] for batch in batches)
        masked = max((batch.shape[1] for batch in batches if batch.is_masked()), default=0)
        forecast = Forecast(survey, plan.batch_tokens, longest, masked, plan.chunk, needs, plan.checkpointed, math.inf)
        for segment in plan.segments[::-1]:
            sums = forecast.sums(segment.layers)
            running, solving = forecast.running(segment), forecast.solving(segment.layers)
            self.forecasts.append({RUNNING: sums + running, SOLVING: sums + solving})
        self.peaks.begin(LAYING)
        return plan


def estimate(model: PeftModel, loader: DataLoader[Any], samples: int, device: torch.device) -> dict[str, Any]:
    """Collect and solve with one block in a segment: peaks and forecasts by phase, in GiB, the model included."""
    task, method, peaks = find_task(model.get_base_model()), METHODS["lora_da"], Peaks(device)
    numbers, run = method.presets["default"], Run(Processes(), device, None, False)
    with drawing_mode():
        data = draw(loader, Size(samples), None, None, task.read, method.population)
    solver, plan = LayerSolver(method, numbers, data), Watched(len(task.blocks), peaks)

    def solve(layer: AdapterLayer, observed: Observed) -> Any:
        peaks.begin(SOLVING)
        return solver.solve(layer, observed)

    with estimation_mode(model), _phases_seen(list(task.blocks), peaks, plan):
        layers = find_adapter(model).layers
        collected = collect(task, layers, data, method.needs_with(numbers), run, solve, plan)
    peaks.end()
    used = collected.plan.used
    forecast = used + collected.plan.device_bytes
    peak = max(peak for _, peak in peaks.phases)
    figures: dict[str, Any] = {"plan": collected.plan.line(), "batch_tokens": collected.plan.batch_tokens}
    figures |= {"model_gib": used / GIB, "forecast_gib": forecast / GIB, "peak_gib": peak / GIB}
    figures |= {f"{phase}_gib": peaks.highest(phase) / GIB for phase in (LAYING, RUNNING, SOLVING)}
    for phase in (RUNNING, SOLVING):
        figures[f"{phase}_forecast_gib"] = (used + max(f[phase] for f in plan.forecasts)) / GIB
    figures["borders_on_cpu_gib"] = collected.border_bytes / GIB
    figures["borders_on_cpu_forecast_gib"] = collected.plan.cpu_bytes / GIB
    figures["forecast_over_peak"] = (forecast - used) / max(1, peak - used)
    figures["phases"] = [{"phase": name, "gib": peak / GIB} for name, peak in peaks.phases]
    figures["segments"] = [{phase: (used + size) / GIB for phase, size in f.items()} for f in plan.forecasts]
    return figures


@contextlib.contextmanager
def _phases_seen(blocks: Sequence[torch.nn.Module], peaks: Peaks, plan: Watched) -> Iterator[None]:
    """Tell running from laying, which needs no gradient, as each block begins; before planning there is neither."""

    def begin(*_: Any) -> None:
        if plan.forecasts:
            peaks.begin(RUNNING if torch.is_grad_enabled() else LAYING)

    hooks = [block.register_forward_pre_hook(begin) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
