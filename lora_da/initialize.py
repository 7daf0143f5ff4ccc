"""The story: draw the samples; plan; for each segment of the model collect its statistics and solve; write the factors.

Which statistics, and what is made of them, is the method's: `needs` has the one, `solve` the other.

What an earlier run has solved for the same model, data and settings is taken from the cache where the user keeps one.

Nothing is written before everything is solved, so an error or an interrupt leaves the model as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from lora_da.adapter import Adapter, AdapterLayer, describe_left, find_adapter
from lora_da.cache.fingerprint import fingerprint
from lora_da.cache.store import CacheEntry, cache_folder
from lora_da.collect.collector import Collector
from lora_da.collect.plan import make_plan
from lora_da.collect.schedule import Sweep
from lora_da.collect.survey import survey
from lora_da.config import LoraDAConfig
from lora_da.errors import LoraDAError
from lora_da.memory import PeakMemory
from lora_da.methods.common import LoraFactors
from lora_da.model.blocks import NotARow
from lora_da.model.sharding import compute_device, is_sharded, prepared
from lora_da.model.state import estimation_mode, random_states
from lora_da.needs import NEEDS, full_fisher_layers, servable
from lora_da.processes import Ranks
from lora_da.report import InitReport
from lora_da.samples.draw import InitData, draw
from lora_da.solution import Estimate, solution_of, warn_of_kept
from lora_da.solve import LayerSolver
from lora_da.tasks import RewardLoss, Task, find_task

logger = logging.getLogger(__name__)


def initialize_lora_da_weights(
    peft_model: PeftModel,
    dataloader: Iterable[Mapping[str, Any]],
    config: LoraDAConfig | None = None,
    adapter_name: str | None = None,
    show_progress: bool = True,
    reward: RewardLoss | None = None,
) -> InitReport:
    """Start a LoRA adapter from data, in place: LoRA-DA (arXiv 2510.24561), or another `method` of the settings.

    Args:
        peft_model: a causal or sequence-to-sequence language model, with or without images, or a classifier of
            sequences or tokens, with a freshly added LoRA adapter, its base quantised or not.
        dataloader: yields what the model's forward takes, `labels` included. Of a `DataLoader` only the dataset and
            collator are used; anything else is iterated over.
        config: settings; the defaults if None.
        adapter_name: the adapter; the only active one if None.
        show_progress: show a progress bar and print the one line of the report, in the first process.
        reward: the loss of a reward model that is trained on pairs: a batch holds the chosen rows, then the rejected.

    In several processes (torch.distributed is initialised) all of them call this, each with its own replica or shard of
    the model; the data are those of the first.

    Returns:
        What was done, per layer. `report.skipped` is set, and nothing was changed, if the adapter was trained already.

    Raises:
        LoraDAError: the model, adapter, data or settings do not allow it; the model is as it was before.
    """
    started = time.perf_counter()
    config = config or LoraDAConfig()
    with Ranks().together():
        adapter = find_adapter(peft_model, adapter_name)
        task = find_task(peft_model.get_base_model(), reward)
        ranks = Ranks(is_sharded(peft_model))
    show_progress = show_progress and ranks.rank == 0
    targeted = len(adapter.layers) + len(adapter.left)
    if ranks.any(not adapter.is_untrained()):
        report = InitReport(targeted=targeted, left=adapter.left, skipped="it carries trained weights")
        if ranks.rank == 0:
            say(report.line())
        return report
    with ranks.together():
        adapter = servable(adapter, config.method)
    if adapter.left and ranks.rank == 0:
        logger.warning(describe_left(adapter.left))

    device = compute_device(peft_model.get_base_model().get_input_embeddings().weight)
    memory, entry, solution = PeakMemory(device), None, None
    folder = None if config.cache_dir is None else ranks.from_first(lambda: cache_folder(str(config.cache_dir)))
    with estimation_mode(peft_model):
        data = ranks.from_first(
            lambda: draw(
                dataloader, config.samples, config.seed, config.population_size, task.read, config.method == "lora_da"
            )
        )
        if data.n_samples < config.samples and ranks.rank == 0:
            logger.warning("LoRA-DA: the data hold %d samples, %d were asked for", data.n_samples, config.samples)
        if folder is not None:
            with ranks.together():
                key = fingerprint(peft_model, adapter, data, config, reward)
            entry = CacheEntry(folder, ranks.common(key))
            solution = ranks.from_first(lambda: entry.load(adapter.layers))
    if solution is None:
        with random_states(), prepared(peft_model, task.blocks, device), estimation_mode(peft_model):
            estimate = _estimate(task, adapter, data, config, device, ranks, show_progress)
            with ranks.together():
                solution = solution_of(estimate, adapter, data)
                if entry is not None and ranks.rank == 0:
                    entry.store(solution)
    if ranks.rank == 0:
        warn_of_kept(solution.report, adapter)
    adapter.write(solution.factors, ranks.together)

    report = replace(
        solution.report,
        settings=config.settings(),
        seconds=time.perf_counter() - started,
        peak_memory_gib=memory.gib(),
        memory_of=memory.name,
    )
    if show_progress:
        say(report.line())
    return report


def say(line: str) -> None:
    """Print the one line a user sees, whatever logging is set to."""
    tqdm.write(line)


def _estimate(
    task: Task,
    adapter: Adapter,
    data: InitData,
    config: LoraDAConfig,
    device: torch.device,
    ranks: Ranks,
    show_progress: bool,
) -> Estimate:
    """Collect and solve, one segment of the model after the other, as much of it in a segment as fits in memory."""
    needs, full_fisher = NEEDS[config.method], full_fisher_layers(config, adapter.layers)
    with ranks.together():
        surveyed = survey(task, adapter.layers, task.inputs(data.batches[-1].glimpse(), device), needs.sums)
    why_not = next(filter(None, ranks.gathered(surveyed.why_not)), "")
    if why_not:  # in one process is in all
        surveyed = replace(surveyed, row=None, why_not=why_not)
    while True:
        plan = make_plan(
            surveyed,
            adapter.layers,
            full_fisher,
            data.batches,
            device,
            config.memory_budget,
            ranks=ranks,
            needs=needs,
        )
        if plan.device_bytes > plan.budget:
            logger.warning("LoRA-DA: more memory is needed than there is to plan with: %s", plan.line())
        estimate = Estimate(plan, full_fisher, surveyed.routed)
        try:
            sweep = Sweep(task, data, plan, surveyed, config.numbers(), full_fisher, device, ranks, needs)
            _collect_and_solve(estimate, sweep, config, ranks, show_progress)
            return estimate
        except NotARow as reason:
            if ranks.sharded:  # the others are inside a forward that waits for this process
                raise LoraDAError(
                    f"the model cannot be streamed: {reason}; set a `memory_budget` in which it runs in one pass"
                ) from reason
            del sweep  # what it keeps on the CPU is planned with anew
            logger.warning("LoRA-DA: not streamed, in several passes instead: %s", reason)
            surveyed = replace(surveyed, row=None, why_not=str(reason))


def _collect_and_solve(
    estimate: Estimate, sweep: Sweep, config: LoraDAConfig, ranks: Ranks, show_progress: bool
) -> None:
    title = f"LoRA-DA, {estimate.plan.line()}"
    with tqdm(total=sweep.steps, desc=title, disable=not show_progress, leave=False) as progress:
        for layers, collector in sweep.collected(progress):
            own = Estimate(estimate.plan, estimate.full_fisher, estimate.routed)
            solver = LayerSolver(collector, sweep.drawn, config)
            with ranks.together():
                _solve(own, layers, collector, solver, sweep, ranks, progress)
            del collector, solver  # what they hold must be gone before the next segment
            for part in ranks.gathered((own.factors, own.failed, own.left, own.tokens)):
                estimate.add(*part)
    estimate.loss, estimate.timings = sweep.loss, sweep.watch.seconds()


def _solve(
    estimate: Estimate,
    layers: Sequence[AdapterLayer],
    collector: Collector,
    solver: LayerSolver,
    sweep: Sweep,
    ranks: Ranks,
    progress: tqdm,
) -> None:
    """Solve this process's layers."""
    for layer in layers:
        own, passed_by = collector.owner(layer.name) == ranks.rank, collector.was_passed_by(layer.name)
        if not own:
            if ranks.sharded and not passed_by:
                solver.weight(layer)  # where the base is sharded, all processes gather what its owner reads
            continue
        progress.update()
        if passed_by:
            estimate.left[layer.name] = "an expert that no token of the samples was routed to"
            continue
        with sweep.watch("solve"):
            solved = solver.solve(layer)
        if isinstance(solved, LoraFactors):
            estimate.factors[layer.name] = solved
            estimate.tokens[layer.name] = collector.n_tokens(layer.name)
        else:
            estimate.failed[layer.name] = solved
