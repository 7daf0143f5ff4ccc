"""The story: draw the samples; collect the statistics of every layer and solve it; measure how far to go; write.

Which statistics, and what is made of them, is the method's (`methods`); how the model is run so that they fit in memory
is decided and done in `collect`. What an earlier run has solved for the same model, data and settings is taken from the
cache where the user keeps one.

Nothing is written before everything is solved, so an error or an interrupt leaves the model as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm

from lora_da import first_step, rate
from lora_da.adapter import describe_left, find_adapter
from lora_da.cache import CacheEntry, cache_folder
from lora_da.cache.fingerprint import fingerprint
from lora_da.collect import Planner, collect, make_plan
from lora_da.config import LoraDAConfig
from lora_da.doctor.rows import look_at
from lora_da.memory import PeakMemory, release
from lora_da.model.sharding import compute_device, prepared
from lora_da.model.state import drawing_mode, estimation_mode, left_out_of_the_loss, random_states
from lora_da.processes import Processes, Run
from lora_da.report import InitReport
from lora_da.samples.draw import Size, draw
from lora_da.solution import describe_kept, solution_of
from lora_da.solve import LayerSolver, servable
from lora_da.tasks import RewardLoss, find_task
from lora_da.tasks.inputs import notes_on


def initialize_lora_da_weights(
    peft_model: PeftModel,
    dataloader: Iterable[Mapping[str, Any]],
    config: LoraDAConfig | None = None,
    adapter_name: str | None = None,
    show_progress: bool = True,
    reward: RewardLoss | None = None,
    plan: Planner = make_plan,
    step_rows: int | None = None,
    offloading: Callable[[], AbstractContextManager[Any]] = nullcontext,
    learning_rate: float | None = None,
) -> InitReport:
    """Start a LoRA adapter from data, in place: LoRA-DA (arXiv 2510.24561), or another `method` of the settings.

    Args:
        peft_model: a causal or sequence-to-sequence language model, with or without images, or a classifier of
            sequences or tokens, with a freshly added LoRA adapter, its base quantised or not.
        dataloader: yields what the model's forward takes, `labels` included. Of a `DataLoader` only the dataset and
            collator are used; anything else is iterated over.
        config: settings; the defaults if None.
        adapter_name: the adapter; the only active one if None.
        show_progress: show a progress bar and print the lines of the report, in the first process; that nothing was
            done is said without it too.
        reward: the loss of a reward model that is trained on pairs: a batch holds the chosen rows, then the rejected.
        plan: decides how the model is cut to fit in memory; for benchmarks and tests.
        step_rows: rows of a training step in this process, for the report to say how many of them this took.
        offloading: makes the context in which the trainer moves activations off the device; made anew for each pass,
            and for none whose plan says itself what is kept.
        learning_rate: the largest of the training, by Adam or its kin: where it is too small, lora_A is enlarged.

    In several processes (torch.distributed is initialised) all of them call this, each with its own replica or shard of
    the model; the data and the learning rate are those of the first.

    Returns:
        What was done, per layer. `report.skipped` is set, and nothing was changed, if the adapter was trained already.

    Raises:
        LoraDAError: the model, adapter, data or settings do not allow it; the model is as it was before.
    """
    started, config = time.perf_counter(), config or LoraDAConfig()
    method, numbers = config.chosen_method(), config.numbers()
    processes = Processes()
    adapter = processes.everywhere(find_adapter, peft_model, adapter_name)
    base = peft_model.get_base_model()
    task = processes.everywhere(find_task, base, reward)
    processes = processes.everywhere(processes.over, peft_model)
    show_progress = show_progress and processes.rank == 0
    if processes.anywhere(not adapter.is_untrained()):
        targeted = len(adapter.layers) + len(adapter.left)
        report = InitReport(targeted=targeted, left=adapter.left, skipped="it carries trained weights")
        return say(report) if processes.rank == 0 else report
    learning_rate = processes.once(rate.checked, learning_rate, config)
    adapter = processes.everywhere(servable, adapter, method)
    processes.warn(describe_left(adapter.left))

    device, needs = compute_device(base, task.blocks), method.needs_with(numbers)
    run = Run(processes, device, config.memory_budget, show_progress, offloading)
    memory, entry, solution = PeakMemory(device), None, None
    folder = processes.once(cache_folder, config.cache_dir)
    with drawing_mode():
        others = first_step.DOCUMENTS if numbers.first_step == "measured" else 0
        size = Size(*config.size(), others, large_batches=device.type != "cpu")
        asked = size, config.seed, config.population_size
        data = processes.once(draw, dataloader, *asked, task.read, method.population)
    if folder is not None:
        with estimation_mode(peft_model):
            key = processes.everywhere(fingerprint, peft_model, adapter, data, config, reward)
            entry = CacheEntry(folder, processes.common(key))
            solution = processes.once(entry.load, adapter.layers)
    if solution is None:
        with random_states(), prepared(peft_model, task.blocks, device), estimation_mode(peft_model):
            solver = LayerSolver(method, numbers, data)
            collected = collect(task, adapter.layers, data, needs, run, solver.solve, plan)
            solution = processes.everywhere(solution_of, collected, adapter, data, needs)
        trial = first_step.Trial(peft_model, task, adapter, data, run, collected.plan.batch_tokens)
        solution = first_step.chosen(solution, numbers.first_step, trial)
        if entry is not None:
            processes.once(entry.store, solution)
    solution = rate.matched(solution, adapter, numbers, learning_rate)
    notes = [*notes_on(base, data.batches), *left_out_of_the_loss(base), *first_step.notes_on(numbers, data)]
    processes.warn(*describe_kept(solution.report, adapter), *(f"LoRA-DA: {note}" for note in notes))
    adapter.write(solution.factors, processes.together)
    release(device)

    report = replace(
        solution.report,
        data=look_at(data.looked_at, None, (), dict(solution.report.gradient_norms)) if task.checks_rows else None,
        notes=notes,
        settings=config.settings(),
        peak_memory_gib=memory.gib(),
        memory_of=memory.name,
    ).taking(time.perf_counter() - started, data.row_tokens * (step_rows or 0) * processes.shares)
    return say(report) if show_progress else report


def say(report: InitReport) -> InitReport:
    """Print the one line a user sees, whatever logging is set to."""
    tqdm.write(report.line())
    return report
