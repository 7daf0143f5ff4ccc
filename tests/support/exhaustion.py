"""Memory that runs out where a test wants it to, and all that can be seen of an initialisation in which it did."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from peft import PeftModel
from picture import differences, picture
from planning import Forced, Way, recorded

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.collect.collector import Collector
from lora_da.collect.schedule import Schedule
from lora_da.model.blocks import BlockSequence
from lora_da.report import InitReport
from lora_da.solve import LayerSolver
from lora_da.statistics import LayerSums


class Full:
    """Memory that runs out once the plan is run: at the n-th call of `used`, or whenever what is asked is too much."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.at, self.calls, self.times, self.begun = at, 0, 0, False
        original = Schedule.run

        def run(schedule: Schedule, *args: Any) -> None:
            self.begun = True
            original(schedule, *args)

        patch.setattr(Schedule, "run", run)

    def used(self, too_much: bool = False) -> None:
        if not self.begun:
            return
        self.calls += 1
        if too_much or self.calls == self.at:
            self.times += 1
            raise torch.OutOfMemoryError("no memory left")


def at_the_borders(patch: pytest.MonkeyPatch, model: PeftModel, full: Full, rows: int | None = None) -> None:
    """While hidden states are laid down: a forward without gradient of which some are kept."""
    original = BlockSequence.run

    def run(self: BlockSequence, hidden: Any, keep: Any, **inputs: Any) -> Any:
        if keep:
            full.used(rows is not None and len(inputs["input_ids"]) > rows)
        return original(self, hidden, keep, **inputs)

    patch.setattr(BlockSequence, "run", run)


def in_a_forward(patch: pytest.MonkeyPatch, model: PeftModel, full: Full, rows: int | None = None) -> None:
    """In a block of a forward whose activations are kept."""

    def used(_module: Any, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            full.used(rows is not None and len(args[0]) > rows)

    for block in model.get_base_model().model.layers:
        block.mlp.register_forward_pre_hook(used)


def in_a_backward(patch: pytest.MonkeyPatch, model: PeftModel, full: Full, rows: int | None = None) -> None:
    """While the tokens of a layer are summed."""
    running = [0]  # rows of the batch

    def note(_module: Any, args: tuple[Any, ...]) -> None:
        running[0] = len(args[0])

    for block in model.get_base_model().model.layers:
        block.mlp.register_forward_pre_hook(note)
    after_each_sum(patch, lambda: full.used(rows is not None and running[0] > rows))


def while_watching(patch: pytest.MonkeyPatch, full: Full, too_much: Callable[[Collection[str]], bool]) -> None:
    """While tokens are summed, where too much is decided by the layers whose sums are held."""
    watched: list[Collection[str]] = []
    original = Collector.observing

    def observing(self: Collector) -> Any:
        watched.append(self.layers.keys())
        return original(self)

    patch.setattr(Collector, "observing", observing)
    after_each_sum(patch, lambda: full.used(too_much(watched[-1])))


def after_each_sum(patch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    original = LayerSums.add

    def add(self: LayerSums, x: torch.Tensor, d: torch.Tensor) -> None:
        original(self, x, d)
        do()

    patch.setattr(LayerSums, "add", add)


STAGES = {"borders": at_the_borders, "forward": in_a_forward, "backward": in_a_backward}


class Initialised:
    """An initialisation with what can be seen of it."""

    def __init__(self, model: PeftModel, way: Way, batches: list[dict[str, Any]], config: LoraDAConfig) -> None:
        self.solved: list[str] = []
        original = LayerSolver.solve

        def solve(solver: LayerSolver, layer: Any, observed: Any) -> Any:
            self.solved.append(layer.name)
            return original(solver, layer, observed)

        before = picture(model)
        with pytest.MonkeyPatch.context() as patch, recorded() as self.statistics:
            patch.setattr(LayerSolver, "solve", solve)
            self.report: InitReport = initialize_lora_da_weights(
                model, batches, config, show_progress=False, plan=Forced(way)
            )
        self.changed = differences(before, picture(model))
        self.products = {name: product_of(model, name) for name in self.report.layers}


def product_of(model: PeftModel, name: str) -> torch.Tensor:
    module = model.get_submodule(name)
    product: torch.Tensor = module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
    return product
