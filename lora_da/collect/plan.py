"""How the samples are run through the model so that everything fits: in one pass, in segments, or in several passes.

A segment is a run of decoder blocks whose statistics are taken together. One segment of all blocks is one ordinary
pass. Several are streamed from the last to the first, each from the hidden state at its lower border: a forward and a
backward with one recomputation, as checkpointed training does them, whatever their number. Where the CPU has no room
for all borders, some are held and blocks are run again from there; fewer segments, whose activations are computed
again block by block, are then the alternative. Where a segment's sums do not fit together, it is run several times,
for some of its layers each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from lora_da.adapter import AdapterLayer
from lora_da.collect.cuts import cut
from lora_da.collect.forecast import Forecast, Segment, border_bytes
from lora_da.collect.keeping import cost, walk
from lora_da.collect.survey import Survey
from lora_da.collect.ways import Way, cheapest
from lora_da.memory import GIB, is_host, used_bytes
from lora_da.needs import Needs
from lora_da.processes import Processes, Run
from lora_da.samples.batch import BATCH_TOKENS, Batch, shared
from lora_da.tasks import head

# Shares of the free memory that are planned with: allocators leave gaps, and the figures below are estimates.
DEVICE_SHARE = 0.85
CPU_SHARE = 0.5  # the user's other processes live there
BORDER_SHARE = 0.25  # for the hidden states at borders where the model is in the same memory
LARGER_CHUNKS = (8, 4, 2, 1)  # of the head, where a GPU has room: the fewer, the less often its weight is read
# Room for the gradients on both sides of a segment and for one hidden state further down: with it, a plan costs at most
# so many times what it costs with room for all borders.
ENOUGH_BORDERS, ENOUGH = 3, 2.5


@dataclass(frozen=True)
class Plan:
    """Segments, the lowest first, and what they are forecast to take.

    Args:
        segments: what is run, from the last to the first; the same blocks may appear several times.
        device_bytes: of the layers' device, beyond what is in use before.
        batch_tokens: tokens in a batch at most, padding included, where its rows allow it.
        chunk: tokens whose logits exist at once.
        cpu_bytes: of the CPU, for the hidden states at the borders.
        budget: bytes of the device there are.
        used: bytes of the device in use before: the model.
        why_not_streamed: the reason where the model is not to be cut; empty where it may be.
        borders: for how many borders' hidden states or gradients there is room on the CPU.
        checkpointed: whether segments keep what enters a block, and compute its activations again in the backward.
        warning: a sentence where the CPU's memory makes it much slower; empty where it does not.
    """

    segments: tuple[Segment, ...]
    device_bytes: int
    batch_tokens: int
    chunk: int
    cpu_bytes: int
    budget: int
    used: int
    why_not_streamed: str
    borders: int
    checkpointed: bool
    warning: str

    @property
    def cuts(self) -> int:
        """Number of different runs of blocks."""
        return len({(s.first, s.stop) for s in self.segments})

    @property
    def passes(self) -> int:
        """How often the samples run through the blocks that are run most often."""
        ranges = [(s.first, s.stop) for s in self.segments]
        return max(map(ranges.count, ranges), default=0)

    @property
    def cost(self) -> int:
        """What a token costs, in forwards through one block: each forward without gradients, to lay borders or to get
        from one to a segment, is 1; each run of a block in a segment 1 forward (2 where it is checkpointed) and 1
        backward; the products of its layers 2, once. So a block costs 4 in one pass, and 5 in segments with all borders
        held."""
        return cost(self.segments, self.borders, self.checkpointed)

    @property
    def forwards(self) -> float:
        """How often a block is run without gradients, on average."""
        return walk(self.segments, self.borders).forwards / max(s.stop for s in self.segments)

    def line(self) -> str:
        """One line: the kind, its parts and the memory."""
        total = f"{(self.used + self.device_bytes) / GIB:.1f} of {(self.used + self.budget) / GIB:.1f} GiB"
        blocks = max(s.stop - s.first for s in self.segments)
        times = f", each run {self.passes} times" if self.passes > 1 else ""
        kind = "checkpointed " if self.checkpointed else ""
        if self.cuts > 1:
            name = "layer" if blocks == 1 else "layers"
            borders = f", {self.cpu_bytes / GIB:.1f} GiB on the CPU" if self.cpu_bytes >= GIB / 20 else ""
            again = f", forward {self.forwards:.1f} times" if self.forwards >= 1.05 else ""
            return f"streamed: {self.cuts} {kind}segments of {blocks} {name}{times}{again}, {total}{borders}"
        why = f" (not streamed: {self.why_not_streamed})" if self.why_not_streamed and self.passes > 1 else ""
        return f"{f'one {kind}pass' if self.passes == 1 else f'{self.passes} {kind}passes'}{why}, {total}"


# From what a survey has found, the layers to be served, the batches, what is taken of the layers, and where it runs.
Planner: TypeAlias = Callable[[Survey, Sequence[AdapterLayer], Sequence[Batch], Needs, Run], Plan]


def make_plan(survey: Survey, layers: Sequence[AdapterLayer], batches: Sequence[Batch], needs: Needs, run: Run) -> Plan:
    """Make the cheapest plan that fits, which is that of the fewest segments where the CPU has room for their borders;
    where single blocks do not fit, that with the fewest runs.

    Every process makes the same: for the largest share of the batches, and the least memory that any of them has.

    Args:
        survey: of the model.
        layers: those to be served, in the model's order.
        batches: what is run, by all processes together.
        needs: what is taken of the layers.
        run: where.
    """
    room = _Room(survey, layers, batches, needs, run)
    plan = room.plan(room.cheapest(room.borders), room.borders)
    if plan.borders >= survey.n_blocks or survey.sequence is None:
        return plan
    plenty = room.plan(room.cheapest(survey.n_blocks), survey.n_blocks)
    return replace(plan, warning=room.shortage(plan)) if plan.cost > ENOUGH * plenty.cost else plan


def in_segments(cuts: int) -> Planner:
    """Plan so many segments, whether they fit or not."""

    def plan(survey: Survey, layers: Sequence[AdapterLayer], batches: Sequence[Batch], needs: Needs, run: Run) -> Plan:
        room = _Room(survey, layers, batches, needs, run)
        return room.plan(Way(room.needed, cut(survey, layers, cuts)), room.borders)

    return plan


def _free_bytes(survey: Survey, run: Run) -> int:
    """What is free where the layers are; of several devices, on the fullest, as each holds its own layers' sums."""
    devices = survey.devices if len(survey.devices) > 1 else (str(run.device),)
    return min(run.processes.free_bytes(torch.device(device)) for device in devices)


def shares_of(batches: Sequence[Batch], processes: Processes) -> list[list[Batch]]:
    """What each process runs: all of it where they gather the same parameters in the same order."""
    return [list(batches)] * processes.size if processes.sharded else shared(batches, processes.size)


def _undivided(batches: Sequence[Batch]) -> int:
    """Tokens of the largest batch once those that can be are divided down to `BATCH_TOKENS`."""
    return max(
        b.n_positions
        if b.n_positions <= BATCH_TOKENS or b.shape[0] == 1 or b.halves() is None
        else max(BATCH_TOKENS, b.shape[1])
        for b in batches
    )


class _Room:
    """What the batches take, and the room there is for it.

    Attributes:
        needed: what the largest batches take of the device.
        borders: for how many there is room on the CPU.
    """

    def __init__(
        self, survey: Survey, layers: Sequence[AdapterLayer], batches: Sequence[Batch], needs: Needs, run: Run
    ) -> None:
        device, on_host = run.device, is_host(run.device)
        shares = shares_of(batches, run.processes)
        share, free = CPU_SHARE if on_host else DEVICE_SHARE, _free_bytes(survey, run)
        self._layers, self._device = layers, device
        self._budget = int(share * free if run.memory_budget is None else run.memory_budget * GIB)
        self._documents = sum(b.tokens.n_documents for b in batches)
        self._at_border = max(1, border_bytes(shares[0], survey, device))
        self._on_cpu = int((BORDER_SHARE if on_host else CPU_SHARE) * run.processes.free_bytes(torch.device("cpu")))
        self.borders = self._on_cpu // self._at_border
        sizes = [(b.n_positions, b.shape[1]) for share in shares for b in share]
        largest, longest = (max(of_all) for of_all in zip(*sizes, strict=True))
        masked = max((b.shape[1] for b in batches if b.is_masked()), default=0)
        # What a GPU has no room to solve is solved on the CPU.
        elsewhere = math.inf if on_host else self._budget
        small = largest if device.type == "cpu" else _undivided(batches)
        self.needed = Forecast(survey, small, longest, masked, head.CHUNK, needs, False, elsewhere)
        self._largest = largest

    def cheapest(self, borders: int) -> Way:
        """The cheapest way, with room for so many borders."""
        return cheapest(self._layers, self.needed, self._budget, borders)

    def roomier(self, way: Way) -> Way:
        """The same way with the largest batches, and then chunks of the head, that fit where a GPU has room."""
        if self._device.type == "cpu":
            return way
        batches = [size for size in (self._largest, self._largest // 2) if size > way.needed.batch_tokens]
        for size in (*batches, way.needed.batch_tokens):
            for chunk in (way.needed.chunk * times for times in LARGER_CHUNKS):
                found = replace(way, needed=replace(way.needed, batch_tokens=size, chunk=chunk))
                if found.fits(self._budget):
                    return found
        return way

    def plan(self, way: Way, borders: int) -> Plan:
        """The plan of one way."""
        way = self.roomier(way)
        return Plan(
            segments=tuple(way.segments),
            device_bytes=way.bytes,
            batch_tokens=way.needed.batch_tokens,
            chunk=way.needed.chunk,
            cpu_bytes=walk(way.segments, borders).held * self._at_border,
            budget=self._budget,
            used=used_bytes(self._device),
            why_not_streamed=way.needed.survey.why_not,
            borders=borders,
            checkpointed=way.needed.checkpointed,
            warning="",
        )

    def shortage(self, plan: Plan) -> str:
        """What to say where the CPU has no room for `ENOUGH_BORDERS`."""
        fit = self._documents * self._on_cpu // (ENOUGH_BORDERS * self._at_border)
        samples = f", or set `samples` to {fit}" if 0 < fit < self._documents else ""
        return (
            f"memory of the CPU is short: {self._documents} samples take {self._at_border / GIB:.1f} GiB at a border "
            f"between segments, where {self._on_cpu / GIB:.1f} GiB may be used, so that blocks are run many times "
            f"({plan.line()}); free some{samples}"
        )
