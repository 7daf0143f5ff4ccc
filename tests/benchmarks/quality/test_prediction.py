"""The quality benchmark's predicted rate is the one whose first Adam step lowers the loss the most."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from models import tiny_llama

from benchmarks.quality.prediction import best_first_step, lowest
from lora_da.samples.rows import collate

pytestmark = pytest.mark.once

ROWS = [
    {"input_ids": [(n * k) % 29 + 1 for k in range(1, 7 + n)], "labels": [-100, -100, *[n % 29] * (4 + n)]}
    for n in range(1, 7)
]


def adapted() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("best", [2.7e-5, 1e-3, 4e-2])
def test_the_vertex_of_a_parabola_is_found(best: float) -> None:
    def loss_after(rate: float) -> float:
        return 5.0 if rate == 0 else math.log10(rate / best) ** 2

    assert lowest(loss_after) == pytest.approx(best)


def test_rates_that_diverge_are_not_chosen() -> None:
    assert lowest(lambda rate: math.nan if rate > 2e-3 else 1 - rate) == pytest.approx(10**-2.75)


def test_a_step_that_only_harms_has_no_rate() -> None:
    assert lowest(lambda rate: 1 + rate) is None


def test_the_step_is_adams_and_the_model_is_as_it_was() -> None:
    """Oracle: torch's Adam, one step from the same start, at the rate predicted and well beside it."""
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rate = best_first_step(model, ROWS, batch=len(ROWS))
    assert rate is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    def after(rate: float) -> float:
        stepped = adapted()
        optimizer = torch.optim.Adam([p for p in stepped.parameters() if p.requires_grad], lr=rate)
        stepped(**collate(ROWS)).loss.backward()
        optimizer.step()
        with torch.no_grad():
            return float(stepped(**collate(ROWS)).loss)

    losses = [after(rate * factor) for factor in (0.3, 0.75, 1.0, 1.33, 3.0)]
    assert max(losses[1:4]) < min(losses[0], losses[4])
    assert losses[2] <= min(losses[1], losses[3]) + 1e-3 * losses[2]
