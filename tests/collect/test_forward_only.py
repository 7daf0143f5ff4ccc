"""A forward pass alone, whatever the model is trained for: the inputs, the tokens and the loss of the full pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import classifiers
import image_models
import pytest
import rewards
import torch
import translators
from collecting import distance
from peft import PeftModel
from planning import Forced, Way, recorded

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.tasks import RewardLoss

FORWARD = 1e-6  # float32 forwards with and without a graph
Case = Callable[[], tuple[PeftModel, list[dict[str, Any]], dict[str, Any]]]


def classifying(kind: str, head: str) -> Case:
    rows = classifiers.single() if head == "Sequence" else classifiers.tagged()
    return lambda: (classifiers.adapted(classifiers.classifier(kind, head)), classifiers.in_batches(rows, 3), {})


def rewarding() -> tuple[PeftModel, list[dict[str, Any]], dict[str, Any]]:
    model = rewards.reward_model()
    return classifiers.adapted(model), rewards.in_batches(rewards.pairs(), 3), {"reward": RewardLoss(0.1)}


def translating(kind: str) -> Case:
    rows = translators.in_batches(translators.pairs(), 3)
    return lambda: (translators.adapted(translators.translator(kind)), rows, {})


def reading(kind: str) -> Case:
    return lambda: (
        image_models.adapted(image_models.reader(kind)),
        image_models.in_batches(image_models.rows(kind), 3),
        {},
    )


CASES: dict[str, Case] = {
    "Llama, rows": classifying("Llama", "Sequence"),
    "Bert, rows": classifying("Bert", "Sequence"),
    "Bert, tokens": classifying("Bert", "Token"),
    "rewards": rewarding,
    **{kind: translating(kind) for kind in translators.MODELS},
    **{kind: reading(kind) for kind in image_models.KINDS},
}


@pytest.mark.parametrize("cuts", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_it_sees_what_the_full_pass_sees(case: str, cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for method in ("lora_da", "cntlora"):
        model, batches, named = CASES[case]()
        with recorded() as statistics, monkeypatch.context() as patch:
            if method == "cntlora":
                patch.setattr(torch.Tensor, "backward", pytest.fail)
                patch.setattr(torch.autograd, "grad", pytest.fail)
            config = LoraDAConfig(method=method, first_step="gamma" if method == "lora_da" else None)
            way = Forced(Way(cuts=cuts))
            report = initialize_lora_da_weights(model, batches, config, show_progress=False, plan=way, **named)
        found[method] = statistics, report
    (full, report), (forward, alone) = found["lora_da"], found["cntlora"]
    assert full.keys() == forward.keys() and full
    for name, seen in full.items():
        assert forward[name].grad is None and forward[name].n_tokens == seen.n_tokens
        assert distance(forward[name].input_cov, seen.input_cov) <= FORWARD, name
    assert alone.initialized == report.initialized and alone.tokens == report.tokens
    assert alone.loss == pytest.approx(report.loss, rel=FORWARD)
