"""How large lora_A is beside the trainer's learning rate.

Adam's first step moves every entry of lora_B by the learning rate η, whatever the gradient's size, and so the weights by
s·η·S·lora_A, where S (o, r) holds signs: a length of about s·η·√o·‖lora_A‖_F, the Frobenius norm for columns of signs
that have nothing to do with each other. How long a step is good is known by then, because the first step was measured.
A learning rate at which training steps are far shorter than that is too small, and lora_A times c with lora_B divided by
c, which leaves the model as it is, makes them c times as long: with it the same learning rate goes c times as far.

The learning rate at which both are equally long was 0.014, 0.030 and 0.054 on three tasks at alpha/r 0.5, where plain
LoRA's first Adam step lowers the loss the most at 0.018, 0.019 and …, and 0.013 was the best for plain LoRA over 60 steps
(benchmarks/results/quality).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lora_da.adapter import Adapter
from lora_da.errors import LoraDAError
from lora_da.methods.common import squared_norm
from lora_da.methods.method import Numbers, Preset
from lora_da.report import RateReport
from lora_da.solution import Solution

SHORTEST = 1 / 8  # of the measured first step: what a training step should be, at least
MOST_TIMES = 32  # nothing larger has been trained with


def matched(
    solution: Solution, adapter: Adapter, numbers: Preset | Numbers, learning_rate: float | None
) -> Solution:
    """The solution with lora_A enlarged for a learning rate that is too small for the first step that was measured.

    The factor is a power of two, so that lora_B·lora_A stays the same to the last digit.

    Args:
        solution: with the first step that was chosen; as it is where none was measured, or none lowered the loss.
        adapter: that it is for.
        numbers: of the method; nothing is done unless they have `match_rate`.
        learning_rate: the trainer's largest, of an optimizer whose steps are as long as Adam's; None where it is not
            known, and nothing is done.
    """
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise LoraDAError(f"learning_rate is {learning_rate!r}; set a number above 0, or leave it out")
    step = solution.report.first_step
    if not numbers.match_rate or learning_rate is None or step is None or not step.length:
        return solution
    equal = rate_of_first_step(solution, adapter)
    times = max(1, min(MOST_TIMES, 2 ** math.floor(math.log2(max(1.0, SHORTEST * equal / learning_rate)))))
    factors = {name: (a * times, b / times) for name, (a, b) in solution.factors.items()}
    rate = RateReport(learning_rate, equal, times)
    return replace(solution, factors=factors, report=replace(solution.report, rate=rate))


def rate_of_first_step(solution: Solution, adapter: Adapter) -> float:
    """The learning rate at which Adam's first step in lora_B is as long as the step that the solution takes: root mean
    squares over the layers, of Frobenius norms."""
    taken = adams = 0.0
    for layer in adapter.layers:
        if layer.name not in solution.factors:
            continue
        a, b = (factor.double() for factor in solution.factors[layer.name])
        taken += layer.scaling**2 * ((b.T @ b) * (a @ a.T)).sum().item()
        adams += layer.scaling**2 * layer.out_features * squared_norm(a)
    return math.sqrt(max(0.0, taken) / adams)


def largest_rate(groups: Iterable[Mapping[str, Any]] | None) -> float | None:
    """The learning rate of an optimizer's parameter groups, the largest of them after warmup; None where its steps are
    not as long as its rate, as Adam's and its kin's are, which have `betas`."""
    rates = [group.get("initial_lr", group["lr"]) for group in groups or () if "betas" in group]
    largest = max(map(float, rates), default=0.0)
    return largest or None
