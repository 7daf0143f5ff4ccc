"""How large lora_A is beside the trainer's learning rate.

Adam's first step moves every entry of lora_B by the learning rate η, whatever the gradient's size, and so the weights
by s·η·S·lora_A, where S (o, r) holds signs: by a Frobenius norm of s·η·√o·‖lora_A‖_F, where the columns of S have
nothing to do with each other. How long a step is good is known by then, because the first step was measured. Where
training steps would be far shorter than that, lora_A is multiplied and lora_B divided by one factor c: the model stays
as it is, and each of Adam's steps in lora_B goes c times as far. To Adam that is lora_B at c times the learning rate
and lora_A at 1/c of it. Gradients of lora_B are c times larger, those of lora_A c times smaller; where the first make
that all are clipped, the second come nearer to Adam's epsilon, and lora_A turns still less.

With SmolLM2-135M at alpha/r 0.5 the two are equally long at a learning rate of 0.014 (NL2Bash), 0.030 (GSM8K) and 0.055
(E2E). Over 60 steps of GSM8K plain LoRA's best of five rates was 0.0032 at alpha/r 2, which is 0.013 here
(benchmarks/results/quality). Users set 0.0002.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lora_da.adapter import Adapter
from lora_da.config import LoraDAConfig, check_number
from lora_da.errors import LoraDAError
from lora_da.methods.common import squared_norm
from lora_da.methods.method import Numbers, Preset
from lora_da.report import RateReport
from lora_da.solution import Solution

# Of the measured first step: up to which a training step is brought, and to more than half of it. At 2e-4 and alpha/r
# 0.5 that makes A 8, 16 and 32 times as large on three tasks, of which 16 ended lower than 8 did; a rate that was tuned
# is left alone.
SHARE = 1 / 8
MOST_TIMES = 32  # nothing larger has been trained with


def checked(learning_rate: float | None, config: LoraDAConfig) -> float | None:
    """The learning rate, where it is one, or where there is none and the settings do not ask for it.

    Raises:
        LoraDAError: it is not a finite number above 0, or not known where `match_rate` was set.
    """
    check_number("learning_rate", learning_rate, 0, exclusive=True)
    if config.match_rate and learning_rate is None:
        raise LoraDAError(
            "lora_da.match_rate is True, and no learning rate of Adam or its kin is known; pass `learning_rate`, or "
            "train by one of them, or leave match_rate out"
        )
    return learning_rate


def matched(solution: Solution, adapter: Adapter, numbers: Preset | Numbers, learning_rate: float | None) -> Solution:
    """The solution with lora_A enlarged for a learning rate that is too small for the first step that was measured.

    The factor is the largest power of two with which a step is no longer than `SHARE` of the first one, so that
    lora_B·lora_A stays the same to the last digit in float32 and bfloat16.

    Args:
        solution: with the first step that was chosen; as it is where none was measured, or none lowered the loss.
        adapter: that it is for.
        numbers: of the method; nothing is done unless they have `match_rate`.
        learning_rate: the trainer's largest, of an optimizer whose steps are as long as Adam's; None where it is not
            known, and nothing is done.
    """
    step = solution.report.first_step
    if not numbers.match_rate or learning_rate is None or step is None or not step.length:
        return solution
    equal = rate_of_first_step(solution, adapter)
    short = min(max(SHARE * equal, learning_rate) / learning_rate, MOST_TIMES)
    times = 2 ** math.floor(math.log2(short))
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


def largest_rate(optimizer: Any, asked: float) -> float | None:
    """The largest learning rate that an optimizer comes to; None where its steps are not as long as its rate.

    Schedules begin at a fraction of it and say so in words of their own: of what they say, and what the trainer was
    asked for, the largest counts, so that lora_A is rather left too small than made too large.

    Args:
        optimizer: the trainer's, in accelerate's and DeepSpeed's wrappers or not. Adam, Lion and their kin count, in
            which every parameter group has `betas`: bitsandbytes gives those to its SGD too.
        asked: the trainer's `learning_rate`.
    """
    groups, inner = list(getattr(optimizer, "param_groups", None) or ()), optimizer
    while getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    kind = type(inner).__name__.lower()
    if not groups or not ("adam" in kind or "lion" in kind) or not all("betas" in group for group in groups):
        return None
    told = [float(group[name]) for group in groups for name in ("lr", "initial_lr", "max_lr") if name in group]
    return max([*told, asked]) or None
