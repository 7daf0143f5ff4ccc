"""The planner: the fewest segments that fit, every layer in one of them, and a line that says so."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from architectures import BLOCKS, LLAMA
from collecting import PLENTY, worst
from models import LENGTHS, documents, packed, pad, with_lora
from oracle import oracle_statistics
from peft import PeftModel
from planning import CPU, Way, collected_by, surveyed_model
from tolerances import FLOAT32

import lora_da.collect.plan
import lora_da.processes
from lora_da.adapter import find_adapter
from lora_da.collect.borders import Border
from lora_da.collect.cuts import cut, in_parts, split
from lora_da.collect.forecast import Segment
from lora_da.collect.plan import Plan, make_plan
from lora_da.collect.survey import Survey
from lora_da.memory import GIB
from lora_da.methods import METHODS
from lora_da.needs import Needs
from lora_da.processes import Processes, Run
from lora_da.samples.draw import Size, draw, read_causal
from lora_da.statistics import gradient_bytes, input_bytes

ROWS = documents(LENGTHS)
BATCHES = [pad(ROWS), packed(ROWS)]


def needs_of(full_fisher: bool) -> Needs:
    """What LoRA-DA reads, with the output Fisher in full or as its diagonal."""
    return replace(METHODS["lora_da"].needs, full_fisher_up_to=math.inf if full_fisher else 0)


class Planner:
    """Plans for one tiny model under any budget."""

    def __init__(self, model: PeftModel | None = None, **survey: Any) -> None:
        model = model or with_lora(LLAMA.base(), r=2)
        self.layers = find_adapter(model).layers
        self.batches = draw(BATCHES, Size(1000), None, 1000, read_causal, True).batches
        self.survey: Survey = replace(surveyed_model(model, BATCHES), **survey)

    def __call__(self, budget: float | None, full_fisher: bool = False) -> Plan:
        run = Run(Processes(), CPU, budget, False)
        return make_plan(self.survey, self.layers, self.batches, needs_of(full_fisher), run)

    def falling(self) -> list[Plan]:
        """From one that is plenty to one in which nothing fits."""
        return [self(2.0 ** -(k / 8) / 256) for k in range(160)]

    @property
    def largest(self) -> int:
        return max(rows * columns for rows, columns in (batch.shape for batch in self.batches))


def served(plan: Plan) -> list[str]:
    return sorted(layer.name for segment in plan.segments for layer in segment.layers)


def runs(plan: Plan) -> list[tuple[int, int]]:
    return [(segment.first, segment.stop) for segment in plan.segments]


@pytest.mark.parametrize("row", [True, False])
def test_every_layer_is_served_once_in_the_blocks_that_hold_it(row: bool) -> None:
    planner = Planner() if row else Planner(sequence=None, why_not="unknown")
    for plan in planner.falling():
        assert served(plan) == sorted(layer.name for layer in planner.layers)
        for segment in plan.segments:
            assert all(segment.first <= planner.survey.block_of[a.name] < segment.stop for a in segment.layers)


def test_a_smaller_budget_never_gives_fewer_segments() -> None:
    plans = Planner().falling()
    assert [plan.cuts for plan in plans] == sorted(plan.cuts for plan in plans)
    assert {plan.cuts for plan in plans} >= {1, 2, BLOCKS}
    runs_of = [len(plan.segments) for plan in plans]
    assert runs_of == sorted(runs_of) and runs_of[-1] == len(Planner().layers)


def test_as_few_segments_as_fit() -> None:
    """A plan is within its budget, and the next coarser one was not."""
    planner = Planner()
    forecast = {}
    for cuts in range(1, BLOCKS + 1):
        plans = [plan for plan in planner.falling() if plan.cuts == cuts and plan.passes == 1]
        if plans:
            forecast[cuts] = plans[0].device_bytes
            assert all(plan.device_bytes <= plan.budget for plan in plans)
    assert len(forecast) > 2
    for cuts, needed in forecast.items():
        assert planner(needed / GIB).cuts == cuts
        assert planner((needed - 1) / GIB).cuts > cuts or planner((needed - 1) / GIB).batch_tokens < planner.largest


def test_segments_join_and_are_of_like_size() -> None:
    survey = replace(Planner().survey, linear_features=(1,) * 10, block_of={"first": 0})
    layer = replace(Planner().layers[0], name="first")
    for cuts in range(1, 11):
        segments = cut(survey, [layer], cuts)
        assert segments[0].first == 0 and segments[-1].stop == 10 and len(segments) == cuts
        assert all(a.stop == b.first for a, b in pairwise(segments))
        sizes = {s.stop - s.first for s in segments}
        assert max(sizes) - min(sizes) <= 1


def test_layers_in_parts_where_a_blocks_layers_do_not_fit() -> None:
    planner = Planner()
    plans = [plan for plan in planner.falling() if plan.passes > 1]
    assert plans[-1].passes == len(planner.layers) // BLOCKS and plans[-1].cuts == BLOCKS
    assert any(1 < plan.passes < plans[-1].passes for plan in plans)
    for plan in plans:
        assert plan.batch_tokens == max(batch.shape[1] for batch in planner.batches)  # smaller batches were tried first
        assert f", each run {plan.passes} times, " in plan.line()


def test_parts_are_as_large_as_fits() -> None:
    """One layer after the other gives the same, in more looks."""
    chance = random.Random(0)
    for _ in range(200):
        sizes, room = [chance.randint(1, 9) for _ in range(chance.randint(1, 40))], chance.randint(1, 30)
        expected: list[list[int]] = []
        for size in sizes:
            if expected and sum(expected[-1]) + size <= room:
                expected[-1].append(size)
            else:
                expected.append([size])
        layers: Any = tuple(sizes)
        parts = in_parts(Segment(0, 1, layers), lambda part, room=room: sum(part.layers) <= room)  # type: ignore[arg-type]
        assert [list(part.layers) for part in parts] == expected


def test_smaller_batches_before_layers_in_parts() -> None:
    """Batches are halved where a block does not fit, down to the longest row."""
    planner = Planner()
    planner.batches = [batch for batch in planner.batches if batch.shape[0] > 1]
    longest = max(batch.shape[1] for batch in planner.batches)
    seen = {plan.batch_tokens for plan in planner.falling()}
    assert {planner.largest, planner.largest // 2, longest} <= seen
    assert min(seen) == longest
    assert all(plan.cuts > 1 for plan in planner.falling() if plan.batch_tokens < planner.largest)


def test_a_forecast_holds_the_sums() -> None:
    """A segment's is what its sums take, one Z for each input that layers share, and more for activations."""
    planner = Planner()
    for full_fisher in (False, True):
        plan = planner(PLENTY, full_fisher)
        gradients = sum(gradient_bytes(a.in_features, a.out_features, needs_of(full_fisher)) for a in planner.layers)
        # q, k and v share an input, and so do gate and up; o and down have their own
        inputs = BLOCKS * (3 * input_bytes(32) + input_bytes(48))
        assert gradients + inputs < plan.device_bytes < 10 * (gradients + inputs)


def test_borders_need_memory_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hidden states of all borders do not fit, blocks are run again; without room for gradients, in parts."""
    planner = Planner()
    in_fours = planner(PLENTY).device_bytes
    while (plenty := planner(in_fours / GIB)).cuts < BLOCKS:
        in_fours = plenty.device_bytes - 1
    in_fours = int(
        0.8 * plenty.device_bytes
    )  # with more, one checkpointed segment of smaller batches does nearly as well
    plenty = planner(in_fours / GIB)
    assert plenty.cuts == BLOCKS and plenty.device_bytes <= plenty.budget
    at_a_border = sum(rows * columns for rows, columns in (batch.shape for batch in planner.batches)) * 32 * 4
    costs = []
    for room in range(0, 8 * at_a_border, at_a_border // 4):
        # a quarter of what is free is for the borders where the sums are on the CPU too
        monkeypatch.setattr(lora_da.processes, "free_bytes", lambda device, room=room: 4 * room)
        plan = planner(in_fours / GIB)
        costs.append(plan.cost)
        assert plan.cpu_bytes <= room and plan.device_bytes <= plan.budget
        assert plan.borders == room // at_a_border
        assert plan.cuts == BLOCKS or plan.borders < 2
        assert served(plan) == sorted(layer.name for layer in planner.layers)
        assert ("memory of the CPU is short" in plan.warning) == (plan.cost > 2.5 * plenty.cost)
    assert costs == sorted(costs, reverse=True) and costs[-1] == plenty.cost and costs[0] > 2.5 * plenty.cost


@pytest.mark.parametrize("free", [1, 2**20, 2**34])
def test_without_a_budget_half_of_what_is_free(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where other processes live too."""
    monkeypatch.setattr(lora_da.processes, "free_bytes", lambda device: free)
    planner = Planner()
    assert planner(None).segments == planner(free / 2 / GIB).segments
    assert planner(None).budget == free // 2


@pytest.mark.compat("unknown-architecture")
def test_an_unknown_architecture_is_run_in_passes() -> None:
    planner = Planner(sequence=None, why_not="its decoder has no list of blocks")
    assert planner(PLENTY).line().startswith("one pass, ")
    plan = planner(1 / GIB)
    assert plan.cuts == 1 and plan.passes == len(planner.layers) and set(runs(plan)) == {(0, BLOCKS)}
    assert plan.line().startswith(f"{plan.passes} passes (not streamed: its decoder has no list of blocks), ")
    assert plan.cpu_bytes == 0


def test_the_lines() -> None:
    def line(*segments: tuple[int, int], cpu: float = 0, why: str = "", borders: int = 9, again: bool = False) -> str:
        return Plan(
            tuple(Segment(a, b, ()) for a, b in segments),
            2 * GIB,
            64,
            256,
            int(cpu * GIB),
            7 * GIB,
            GIB,
            why,
            borders,
            again,
            "",
        ).line()

    memory = "3.0 of 8.0 GiB"
    assert line((0, 4)) == line((0, 4), why="no blocks") == f"one pass, {memory}"
    assert line((0, 4), (0, 4)) == f"2 passes, {memory}"
    assert line((0, 4), (0, 4), why="no blocks") == f"2 passes (not streamed: no blocks), {memory}"
    assert line((0, 1), (1, 2)) == f"streamed: 2 segments of 1 layer, {memory}"
    assert line((0, 2), (2, 5), cpu=0.3) == f"streamed: 2 segments of 3 layers, {memory}, 0.3 GiB on the CPU"
    assert line((0, 1), (0, 1), (1, 2)) == f"streamed: 2 segments of 1 layer, each run 2 times, {memory}"


def top_layers(*blocks: int) -> PeftModel:
    targets = ["q_proj", "o_proj", "up_proj"]
    return with_lora(LLAMA.base(), r=2, target_modules=targets, layers_to_transform=list(blocks))


def test_blocks_below_the_lowest_layer_are_no_segment() -> None:
    planner = Planner(top_layers(BLOCKS - 1))
    assert runs(planner(1 / GIB))[0] == (BLOCKS - 1, BLOCKS)
    planner = Planner(top_layers(BLOCKS - 2, BLOCKS - 1))
    assert [s.first for s in cut(planner.survey, planner.layers, BLOCKS)] == [BLOCKS - 2, BLOCKS - 1]
    plan = planner(1 / GIB)
    tokens = sum(rows * columns for rows, columns in (batch.shape for batch in planner.batches))
    assert plan.cpu_bytes >= 2 * tokens * planner.survey.bytes_per_token  # hidden states at two borders are kept


@pytest.mark.parametrize("way", [Way(), Way(cuts=2), Way(cuts=BLOCKS)])
def test_no_gradient_goes_below_the_lowest_layer(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the blocks themselves, and in what is kept at borders."""
    targeted, backwards, kept = [2, 3], set(), []
    model, original = top_layers(*targeted), Border.put

    def note(number: int, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _gradient: backwards.add(number))

    def put(self: Border, number: int, tensor: torch.Tensor) -> None:
        if torch.is_grad_enabled():  # hidden states are laid down without
            kept.append(number)
        original(self, number, tensor)

    monkeypatch.setattr(Border, "put", put)
    for number, block in enumerate(model.get_base_model().model.layers):
        block.mlp.register_forward_hook(lambda _module, _args, output, number=number: note(number, output))
    ours = collected_by(model, BATCHES, way)
    assert worst(ours, oracle_statistics(LLAMA.base(), ROWS + ROWS, list(ours), "tokens")) <= FLOAT32
    assert backwards == set(targeted)
    # of four segments two are left; the gradient crosses the border between them
    assert len(kept) == (len(BATCHES) if way.cuts == BLOCKS else 0)


def test_a_segment_is_split_by_blocks_then_by_layers() -> None:
    planner = Planner()
    pieces = cut(planner.survey, planner.layers, 1)
    while any(split(piece, planner.survey, False) for piece in pieces):
        pieces = [part for piece in pieces for part in (split(piece, planner.survey, False) or (piece,))]
    assert [piece.layers for piece in pieces] == [(layer,) for layer in planner.layers]
    blocks = [planner.survey.block_of[layer.name] for layer in planner.layers]
    assert [(piece.first, piece.stop) for piece in pieces] == [(block, block + 1) for block in blocks]
