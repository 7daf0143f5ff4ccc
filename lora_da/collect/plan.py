"""How the samples are run through the model so that everything fits: in one pass, in segments, or in several passes.

A segment is a run of decoder blocks whose statistics are taken together. One segment of all blocks is one ordinary
pass. Several are streamed from the last to the first, each from the hidden state at its lower border: a forward and a
backward with one recomputation, as checkpointed training does them, whatever their number. Where a segment's sums do
not fit together, it is run several times, for some of its layers each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch

from lora_da.adapter import AdapterLayer
from lora_da.collect.forecast import Forecast, Segment, border_bytes
from lora_da.collect.survey import Survey
from lora_da.memory import GIB, used_bytes
from lora_da.needs import Needs
from lora_da.processes import Processes, Run
from lora_da.samples.batch import Batch, shared

# Shares of the free memory that are planned with: allocators leave gaps, and the figures below are estimates.
DEVICE_SHARE = 0.85
CPU_SHARE = 0.5  # the user's other processes live there
BORDER_SHARE = 0.25  # for the hidden states at borders where the model is on the CPU itself


@dataclass(frozen=True)
class Plan:
    """Segments, the lowest first, and what they are forecast to take.

    Args:
        segments: what is run, from the last to the first; the same blocks may appear several times.
        device_bytes: of the layers' device, beyond what is in use before.
        batch_tokens: tokens in a batch at most, padding included, where its rows allow it.
        cpu_bytes: of the CPU, for the hidden states at the borders.
        budget: bytes of the device there are.
        used: bytes of the device in use before: the model.
        why_not_streamed: the reason where the model is not to be cut; empty where it may be.
    """

    segments: tuple[Segment, ...]
    device_bytes: int
    batch_tokens: int
    cpu_bytes: int
    budget: int
    used: int
    why_not_streamed: str

    @property
    def cuts(self) -> int:
        """Number of different runs of blocks."""
        return len({(s.first, s.stop) for s in self.segments})

    @property
    def passes(self) -> int:
        """How often the samples run through the blocks that are run most often."""
        ranges = [(s.first, s.stop) for s in self.segments]
        return max(map(ranges.count, ranges), default=0)

    def line(self) -> str:
        """One line: the kind, its parts and the memory."""
        total = f"{(self.used + self.device_bytes) / GIB:.1f} of {(self.used + self.budget) / GIB:.1f} GiB"
        blocks = max(s.stop - s.first for s in self.segments)
        times = f", each run {self.passes} times" if self.passes > 1 else ""
        if self.cuts > 1:
            name = "layer" if blocks == 1 else "layers"
            borders = f", {self.cpu_bytes / GIB:.1f} GiB on the CPU" if self.cpu_bytes >= GIB / 20 else ""
            return f"streamed: {self.cuts} segments of {blocks} {name}{times}, {total}{borders}"
        why = f" (not streamed: {self.why_not_streamed})" if self.why_not_streamed and self.passes > 1 else ""
        return f"{'one pass' if self.passes == 1 else f'{self.passes} passes'}{why}, {total}"


# From what a survey has found, the layers to be served, the batches, what is taken of the layers, and where it runs.
Planner: TypeAlias = Callable[[Survey, Sequence[AdapterLayer], Sequence[Batch], Needs, Run], Plan]


def make_plan(survey: Survey, layers: Sequence[AdapterLayer], batches: Sequence[Batch], needs: Needs, run: Run) -> Plan:
    """Make the plan of the fewest segments that fit; where single blocks do not, that with the fewest runs.

    Every process makes the same: for the largest share of the batches, and the least memory that any of them has.

    Args:
        survey: of the model.
        layers: those to be served, in the model's order.
        batches: what is run, by all processes together.
        needs: what is taken of the layers.
        run: where.
    """
    return _planned(survey, layers, batches, needs, run, None)


def in_segments(cuts: int) -> Planner:
    """Plan so many segments, whether they fit or not."""

    def plan(survey: Survey, layers: Sequence[AdapterLayer], batches: Sequence[Batch], needs: Needs, run: Run) -> Plan:
        return _planned(survey, layers, batches, needs, run, cut(survey, layers, cuts))

    return plan


def _planned(
    survey: Survey,
    layers: Sequence[AdapterLayer],
    batches: Sequence[Batch],
    needs: Needs,
    run: Run,
    segments: Sequence[Segment] | None,
) -> Plan:
    device, processes = run.device, run.processes
    shares = shares_of(batches, processes)
    share = CPU_SHARE if device.type == "cpu" else DEVICE_SHARE
    budget = int(share * _free_bytes(survey, run)) if run.memory_budget is None else int(run.memory_budget * GIB)
    largest = max(b.n_positions for share in shares for b in share)
    longest = max(b.shape[1] for share in shares for b in share)
    batches = shares[0]
    most = 1 if survey.sequence is None else survey.n_blocks
    room = (BORDER_SHARE if device.type == "cpu" else CPU_SHARE) * processes.free_bytes(torch.device("cpu"))
    while most > 1 and border_bytes(most - 1, batches, survey, device) > room:
        most -= 1
    needed = Forecast(survey, largest, needs)
    while segments is None:
        segments = next((s for s in _ways(survey, layers, most) if all(needed.bytes(p) <= budget for p in s)), None)
        if needed.batch_tokens <= longest:
            break
        if segments is None:
            needed = replace(needed, batch_tokens=max(needed.batch_tokens // 2, longest))
    if segments is None:  # not even one block's layers fit together
        whole = cut(survey, layers, most)
        segments = [part for s in whole for part in _parts(s, lambda part: needed.bytes(part) <= budget)]
    return Plan(
        segments=tuple(segments),
        device_bytes=max(map(needed.bytes, segments)),
        batch_tokens=needed.batch_tokens,
        cpu_bytes=border_bytes(len({s.first for s in segments} - {0}), batches, survey, device),
        budget=budget,
        used=used_bytes(device),
        why_not_streamed=survey.why_not,
    )


def _free_bytes(survey: Survey, run: Run) -> int:
    """What is free where the layers are; of several devices, on the fullest, as each holds its own layers' sums."""
    devices = survey.devices if len(survey.devices) > 1 else (str(run.device),)
    return min(run.processes.free_bytes(torch.device(device)) for device in devices)


def shares_of(batches: Sequence[Batch], processes: Processes) -> list[list[Batch]]:
    """What each process runs: all of it where they gather the same parameters in the same order."""
    return [list(batches)] * processes.size if processes.sharded else shared(batches, processes.size)


def _ways(survey: Survey, layers: Sequence[AdapterLayer], most: int) -> Iterator[list[Segment]]:
    """In one segment, in two, …"""
    return (cut(survey, layers, cuts) for cuts in range(1, most + 1))


def cut(survey: Survey, layers: Sequence[AdapterLayer], cuts: int) -> list[Segment]:
    """The decoder in `cuts` segments of like size, without those below the lowest targeted layer."""
    if cuts == 1:
        return [Segment(0, survey.n_blocks, tuple(layers))]
    n = survey.n_blocks
    borders = sorted({round(k * n / cuts) for k in range(cuts + 1)})
    segments = [
        Segment(a, b, tuple(layer for layer in layers if a <= survey.block_of[layer.name] < b))
        for a, b in pairwise(borders)
    ]
    while segments and not segments[0].layers:
        segments.pop(0)
    return segments


def split(segment: Segment, survey: Survey, by_layers: bool) -> tuple[Segment, Segment] | None:
    """A segment in two, for when it was too large after all: by its blocks, or where it is one or asked so, by its
    layers; None where there is one of these only."""
    if not by_layers and segment.stop - segment.first > 1:
        middle = (segment.first + segment.stop) // 2
        below = tuple(layer for layer in segment.layers if survey.block_of[layer.name] < middle)
        above = tuple(layer for layer in segment.layers if survey.block_of[layer.name] >= middle)
        return Segment(segment.first, middle, below), Segment(middle, segment.stop, above)
    if len(segment.layers) < 2:
        return None
    half = len(segment.layers) // 2
    return replace(segment, layers=segment.layers[:half]), replace(segment, layers=segment.layers[half:])


def _parts(segment: Segment, fits: Callable[[Segment], bool]) -> list[Segment]:
    """A segment's layers in groups that fit, one layer at least in each: the same blocks, run once for each group."""
    parts: list[Segment] = []
    for layer in segment.layers:
        larger = replace(parts[-1], layers=(*parts[-1].layers, layer)) if parts else None
        if larger is not None and fits(larger):
            parts[-1] = larger
        else:
            parts.append(replace(segment, layers=(layer,)))
    return parts or [segment]
