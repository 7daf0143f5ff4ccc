"""How far along lora_B·lora_A training starts, measured.

A method gives the direction of each layer's first step; how far it holds is another question. Read as a Newton step of
the Fisher, LoRA-DA's is tens of thousands of times too long on a real model (benchmarks/results/step_length), and a
length that serves one task and one `lora_alpha` is off on others. So every layer's step is given the same length in the
Fisher, which lets no layer move the predictions more than another, and a few lengths are tried by forward passes over
documents that the estimate has not seen, all layers together; the one with the lowest loss is kept. Where none is lower
than the base's, lora_B is zero and training starts at the base, with the lora_A that was found.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor

from lora_da.adapter import Adapter
from lora_da.errors import LoraDAError
from lora_da.memory import is_out_of_memory
from lora_da.methods.method import Numbers, Preset
from lora_da.model.sharding import prepared
from lora_da.model.state import estimation_mode, without_checkpointing
from lora_da.processes import Run
from lora_da.report import FirstStepReport
from lora_da.samples.batch import Batch, divided, shared
from lora_da.samples.draw import InitData
from lora_da.solution import Solution
from lora_da.tasks import Task
from lora_da.tasks.head import LossPass

# Both as measured on three tasks (benchmarks/results/first_length): chosen by 8 documents, a length leaves 0.02 of the
# loss or less to gain, where the step gains 0.3 to 0.9, and a search from 1/4 takes 3 to 5 forwards of each;
# from 1/2 it leaves 0.1 on two of the tasks.
DOCUMENTS = 8
# Lengths are root mean squares, over the layers, of the spectral norm of s·lora_B·lora_A.
FIRST_LENGTH = 1 / 4
LONGER, SHORTER = 2.0, 1 / 4  # a step that raises the loss is at least twice too long where the loss is a parabola
MOST_TRIALS = 4

LOSS_ALONE = LossPass(
    scale=1.0,
    weights=None,
    timed=lambda _: contextlib.nullcontext(),
    in_head=lambda _n, _weights: contextlib.nullcontext(),
)


def notes_on(numbers: Preset | Numbers, data: InitData) -> list[str]:
    """Sentences on a first step that is to be measured and cannot be."""
    if numbers.first_step != "measured" or data.others:
        return []
    return [
        "the data hold no documents beside those that were estimated on, to measure the first step by: lora_B is zero; "
        "take more rows, smaller batches, or set `first_step: gamma`"
    ]


@dataclass(frozen=True)
class Trial:
    """Where lengths are tried.

    Args:
        model: with the adapter.
        task: of its base.
        adapter: that a solution is for.
        data: with the other documents; where there are none, nothing is tried.
        run: where.
        batch_tokens: positions in a batch at most.
    """

    model: PeftModel
    task: Task
    adapter: Adapter
    data: InitData
    run: Run
    batch_tokens: int


def chosen(solution: Solution, kind: str | None, trial: Trial) -> Solution:
    """The solution with the first step that `first_step` in the settings names: `measured`, `none`, or as solved."""
    if kind == "measured":
        return with_measured_length(solution, trial)
    return with_zero_B(solution) if kind == "none" else solution


def with_zero_B(solution: Solution) -> Solution:
    """The solution with lora_B zero: the model starts as it is."""
    return _scaled(solution, dict.fromkeys(solution.factors, 0.0))


def with_measured_length(solution: Solution, trial: Trial) -> Solution:
    """The solution with the lora_B that lowers the loss of the other documents the most; zero where there are none.

    In several processes all of them call this, each with the same solution, and all choose alike. The adapter's
    parameters are as they were when this returns or raises.

    Raises:
        LoraDAError: one row does not fit in memory.
    """
    model, task, adapter, data, run = trial.model, trial.task, trial.adapter, trial.data, trial.run
    began, processes = time.perf_counter(), run.processes
    weights = {name: 1 / (layer.fisher_length or 1.0) for name, layer in solution.report.layers.items()}
    unit = _length(solution, adapter, weights)
    if not data.others or not unit:
        return with_zero_B(solution)

    def at(length: float) -> Solution:
        return _scaled(solution, {name: weight * length / unit for name, weight in weights.items()})

    batches = shared(data.others, processes.shares)[processes.rank % processes.shares]
    n_loss_tokens = sum(int(batch.tokens.loss_tokens.sum()) for batch in data.others)

    def loss_at(length: float) -> float:
        adapter.write(at(length).factors, processes.together)
        parts = [part for batch in batches for part in divided(batch, trial.batch_tokens)]
        with prepared(model, task.blocks, run.device), estimation_mode(model, with_adapter=True), torch.no_grad():
            total = processes.everywhere(_loss, task, parts, run)
        return processes.total(total).item() / n_loss_tokens

    with adapter.kept(), without_checkpointing(model):
        losses = search(loss_at)
    best = min(losses, key=losses.__getitem__)
    kept = at(best)
    report = FirstStepReport(
        documents=sum(batch.tokens.n_documents for batch in data.others),
        loss_before=losses[0.0],
        loss_after=losses[best],
        length=best,
        tried=sorted(losses.items()),
        seconds=time.perf_counter() - began,
    )
    timings = {**kept.report.timings, "first step": report.seconds}
    return replace(kept, report=replace(kept.report, first_step=report, timings=timings))


def search(loss_at: Callable[[float], float], first: float = FIRST_LENGTH) -> dict[float, float]:
    """Losses by length, 0 and the first among them: longer and longer as long as that lowers the loss, or shorter until
    it is below that of 0. A loss that is no number counts as infinite."""

    def tried(length: float) -> float:
        loss = loss_at(length)
        losses[length] = loss if math.isfinite(loss) else math.inf
        return losses[length]

    losses: dict[float, float] = {}
    base, length = tried(0.0), first
    best = tried(length)
    while best >= base and len(losses) <= MOST_TRIALS:
        length *= SHORTER
        best = tried(length)
    while length >= first and best < base and len(losses) <= MOST_TRIALS:
        length *= LONGER
        if tried(length) >= best:
            break
        best = losses[length]
    return losses


def _loss(task: Task, batches: Sequence[Batch], run: Run) -> Tensor:
    """The loss of this process's batches, summed, a scalar on the device."""
    total, pending = torch.zeros((), device=run.device), list(batches)
    while pending:
        batch = pending.pop()
        try:
            total += task.backward(batch, task.inputs(batch, run.device), LOSS_ALONE).to(total.device)
        except (RuntimeError, MemoryError) as error:
            halves = None if run.processes.sharded else batch.halves()
            if not is_out_of_memory(error):
                raise
            if halves is None:
                raise LoraDAError(
                    f"out of memory while the first step is measured, with rows of {batch.shape[1]} tokens; set "
                    "`first_step: gamma` (Axolotl: `lora_da.first_step`) to start without measuring"
                ) from error
            pending += halves
    return total


def _length(solution: Solution, adapter: Adapter, weights: Mapping[str, float]) -> float:
    """The root mean square, over the layers, of the spectral norm of s·lora_B·lora_A, each layer's times its weight."""
    scaling = {layer.name: layer.scaling for layer in adapter.layers}
    norms = [weights[name] * scaling[name] * spectral_norm(a, b) for name, (a, b) in solution.factors.items()]
    return math.sqrt(sum(norm**2 for norm in norms) / max(1, len(norms)))


def spectral_norm(lora_A: Tensor, lora_B: Tensor) -> float:
    """‖lora_B·lora_A‖₂, by its square, the largest eigenvalue of a product of r × r; in float64, which no autocast
    touches."""
    a, b = lora_A.double(), lora_B.double()
    return float(torch.linalg.eigvals((b.T @ b) @ (a @ a.T)).abs().max().sqrt())


def _scaled(solution: Solution, by: Mapping[str, float]) -> Solution:
    """The solution with every lora_B times its layer's factor."""
    factors = {name: (a, (b.double() * by[name]).to(b.dtype)) for name, (a, b) in solution.factors.items()}

    def times(value: float | None, name: str) -> float | None:
        return None if value is None else value * by[name]

    layers = {
        name: replace(
            layer, relative_step=times(layer.relative_step, name), fisher_length=times(layer.fisher_length, name)
        )
        for name, layer in solution.report.layers.items()
    }
    return replace(solution, factors=factors, report=replace(solution.report, layers=layers))
