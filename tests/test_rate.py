"""How large lora_A is beside the learning rate: training steps are held against the first step that was measured, and
nothing of the model changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapter_weights, documents, few_tokens, pad, tiny_llama, with_lora
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from trainers import plain
from transformers import TrainerCallback

import lora_da.first_step
from lora_da import InitReport, LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.callback import LoraDACallback
from lora_da.rate import MOST_TIMES, largest_rate
from lora_da.report import REPORT_FILE

SAMPLES = 12
ROWS = few_tokens(documents(SAMPLES + 8, shortest=6, longest=14))
SMALL, LARGE = 1e-7, 10.0
ASKED = 1e-3  # of the trainer


def started(model: PeftModel, learning_rate: float | None, **settings: Any) -> InitReport:
    loader: DataLoader[Any] = DataLoader(ROWS, 4, collate_fn=pad)  # type: ignore[arg-type]
    config = LoraDAConfig(samples=SAMPLES, **settings)
    return initialize_lora_da_weights(model, loader, config, show_progress=False, learning_rate=learning_rate)


def times(found: PeftModel, unscaled: PeftModel) -> float:
    """By which all of lora_A is larger than another's; lora_B is smaller by as much, bit for bit."""
    expected = adapter_weights(unscaled)
    (factor,) = {
        round((value.norm() / expected[name].norm()).item(), 3)
        for name, value in adapter_weights(found).items()
        if "lora_A" in name
    }
    for name, value in adapter_weights(found).items():
        assert torch.equal(value, expected[name] * factor if "lora_A" in name else expected[name] / factor), name
    return factor


def adams_first_step(model: PeftModel, learning_rate: float) -> float:
    """Frobenius norm over all layers of what AdamW's first step in lora_B does to the weights, by torch's own: each
    gradient entry is drawn, with a sign of its own."""
    torch.manual_seed(0)
    layers = find_adapter(model).layers
    before = {layer.name: layer.factors()[1] for layer in layers}
    for layer in layers:
        layer.parameters[1].grad = torch.randn_like(layer.parameters[1])
    torch.optim.AdamW([layer.parameters[1] for layer in layers], learning_rate, weight_decay=0.0).step()
    steps = [layer.scaling * (layer.factors()[1] - before[layer.name]) @ layer.factors()[0] for layer in layers]
    find_adapter(model).write({layer.name: (layer.factors()[0], before[layer.name]) for layer in layers})
    return math.sqrt(sum(step.square().sum().item() for step in steps))


def first_step(model: PeftModel) -> float:
    steps = [layer.scaling * layer.factors()[1] @ layer.factors()[0] for layer in find_adapter(model).layers]
    return math.sqrt(sum(step.square().sum().item() for step in steps))


@pytest.mark.parametrize(
    "options", [{}, {"lora_alpha": 64}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}}], ids=str
)
def test_the_rate_of_the_first_step_is_that_of_torchs_adam(options: dict[str, Any]) -> None:
    model = with_lora(tiny_llama(), **options)
    rate = started(model, LARGE).rate
    assert rate is not None and rate.times == 1
    # Thousands of random signs: columns of them are not quite orthogonal.
    assert adams_first_step(model, rate.of_first_step) == pytest.approx(first_step(model), rel=0.05)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.3, 3.0, 9.0, 30.0, 1e9, 1e300])
def test_a_training_step_is_brought_to_an_eighth_of_it_or_half_of_that(share: float) -> None:
    """By the largest power of two that does not make it longer."""
    model, unscaled = with_lora(tiny_llama()), with_lora(tiny_llama())
    of_first_step = started(unscaled, LARGE).rate.of_first_step  # type: ignore[union-attr]
    learning_rate = of_first_step / 8 / share
    rate = started(model, learning_rate).rate
    assert rate is not None and (rate.learning_rate, rate.of_first_step) == (learning_rate, of_first_step)
    assert (
        rate.times
        == times(model, unscaled)
        == {0.3: 1, 0.7: 1, 1.3: 1, 3.0: 2, 9.0: 8, 30.0: 16, 1e9: 32, 1e300: 32}[share]
    )
    if 1 < rate.times < MOST_TIMES:
        taken = adams_first_step(model, learning_rate) / first_step(model)
        assert 0.95 / 16 < taken < 1.05 / 8  # as far off as above


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_model_is_the_same(dtype: torch.dtype) -> None:
    model, unscaled = (with_lora(tiny_llama()) for _ in range(2))
    for one in (model, unscaled):
        for layer in find_adapter(one).layers:
            for parameter in layer.parameters:
                parameter.data = parameter.data.to(dtype)
    assert started(model, SMALL).rate.times == MOST_TIMES  # type: ignore[union-attr]
    assert started(unscaled, None).rate is None
    for mine, other in zip(find_adapter(model).layers, find_adapter(unscaled).layers, strict=True):
        (a, b), (c, d) = mine.factors(), other.factors()
        assert a.dtype == b.dtype == dtype
        # Float16 rounds what is below 6e-5 to multiples of 2⁻²⁴.
        rounded = MOST_TIMES * 2**-25 if dtype == torch.float16 else 0.0
        assert torch.equal(a, c * MOST_TIMES) and torch.allclose(b * MOST_TIMES, d, rtol=0, atol=rounded)
    if dtype != torch.float16:
        batch = pad(ROWS[:2])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
            assert torch.equal(model.eval()(**batch).logits, unscaled.eval()(**batch).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"match_rate": False},
        {"gamma": 64.0},
        {"first_step": "none"},
        {"preset": "reference"},
        {"preset": "reference", "first_step": "measured"},
        {"method": "lora_one", "first_step": "measured"},
    ],
    ids=str,
)
def test_what_is_left_as_it_is(settings: dict[str, Any]) -> None:
    model, unscaled = with_lora(tiny_llama()), with_lora(tiny_llama())
    assert started(model, SMALL, **settings).rate is None
    assert started(unscaled, None, **settings).rate is None
    assert times(model, unscaled) == 1


def test_it_can_be_asked_for_with_another_preset() -> None:
    report = started(with_lora(tiny_llama()), SMALL, preset="reference", first_step="measured", match_rate=True)
    assert report.rate is not None and report.settings["match_rate"] is True


def test_without_a_first_step_there_is_nothing_to_hold_it_against(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_da.first_step, "search", lambda loss_at: {0.0: loss_at(0.0), 0.5: math.inf})
    assert started(with_lora(tiny_llama()), SMALL).rate is None


def test_one_kept_solution_serves_every_rate(tmp_path: Path) -> None:
    unscaled = with_lora(tiny_llama())
    assert not started(unscaled, None, cache_dir=str(tmp_path)).from_cache
    for learning_rate, factor in ((SMALL, MOST_TIMES), (LARGE, 1), (SMALL, MOST_TIMES)):
        model = with_lora(tiny_llama())
        report = started(model, learning_rate, cache_dir=str(tmp_path))
        assert report.from_cache and report.rate.times == times(model, unscaled) == factor  # type: ignore[union-attr]


def test_the_line_says_so_and_only_where_something_was_done() -> None:
    report = started(with_lora(tiny_llama()), 2e-4)
    assert report.rate is not None and report.rate.times > 1
    assert report.line().endswith(f" before the first step; lora_A × {report.rate.times} for a learning rate of 0.0002")
    assert started(with_lora(tiny_llama()), LARGE).line().endswith("before the first step")
    unknown = "before the first step; lora_A as it is, for no learning rate of Adam or its kin is known"
    assert started(with_lora(tiny_llama()), None).line().endswith(unknown)
    assert started(with_lora(tiny_llama()), None, match_rate=False).line().endswith("before the first step")


def test_a_rate_that_is_not_known_is_an_error_where_it_was_asked_for(tmp_path: Path) -> None:
    model = with_lora(tiny_llama())
    before = adapter_weights(model)
    with pytest.raises(
        LoraDAError, match=r"^lora_da\.match_rate is True, and no learning rate of Adam or its kin is known; pass"
    ):
        started(model, None, match_rate=True)
    with pytest.raises(LoraDAError, match="or train by one of them"):
        callback = LoraDACallback(LoraDAConfig(samples=SAMPLES, match_rate=True))
        plain(model, ROWS, tmp_path, callback, optim="sgd").train()
    assert all(torch.equal(before[name], value) for name, value in adapter_weights(model).items())
    started(model, SMALL)  # trained now: left as it is, whatever is asked for
    assert started(model, None, match_rate=True).skipped is not None


OPTIMIZERS = {
    "AdamW": (lambda p: torch.optim.AdamW(p, 0.3), 0.3),
    "two groups": (lambda p: torch.optim.Adam([{"params": p[:1]}, {"params": p[1:], "lr": 0.7}], 0.3), 0.7),
    "Adam beside another": (lambda p: _beside_muon(torch.optim.AdamW(p, 0.3)), None),
    "SGD": (lambda p: torch.optim.SGD(p, 0.3), None),
    "Adafactor": (lambda p: torch.optim.Adafactor(p, 0.3), None),
    "betas, and no Adam": (lambda p: _WithBetas(p, {"lr": 0.3, "betas": (0.9, 0.99)}), None),
    "before its first step of warmup": (lambda p: _warming(torch.optim.AdamW(p, 0.3)), 0.3),
    "OneCycleLR": (lambda p: _scheduled(p, lr_scheduler.OneCycleLR, max_lr=0.4, total_steps=9), 0.4),
    "a scheduler that says nothing of its end": (lambda p: torch.optim.AdamW(p, 0.0), ASKED),
    "a tensor": (lambda p: torch.optim.AdamW(p, torch.tensor(0.5), foreach=False), 0.5),
}


class _WithBetas(torch.optim.Optimizer):
    """An optimizer that has them and is not Adam, as bitsandbytes' SGD."""


def _beside_muon(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Two optimizers in one, as Muon's are: matrices by orthogonal steps, the rest by Adam's."""
    optimizer.param_groups.append({"params": [], "lr": 0.02, "momentum": 0.95})
    return optimizer


def _warming(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    return optimizer


def _scheduled(parameters: Any, scheduler: Any, **settings: Any) -> torch.optim.Optimizer:
    """At the beginning, where its rate is far below its largest."""
    optimizer = torch.optim.AdamW(parameters, 0.3)
    scheduler(optimizer, **settings)
    assert optimizer.param_groups[0]["lr"] < 0.5 * settings["max_lr"]
    return optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_largest_rate_of_an_optimizer(kind: str) -> None:
    make, rate = OPTIMIZERS[kind]
    assert largest_rate(make([torch.zeros(2, requires_grad=True) for _ in range(3)]), ASKED) == rate


def test_lora_plus_trains_lora_B_at_its_own_rate() -> None:
    model = with_lora(tiny_llama())
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    assert largest_rate(optimizer, 1e-4) == pytest.approx(16e-4)
    assert largest_rate(None, 1e-4) is None


class Seen(TrainerCallback):
    """The adapter as training finds it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.adapter = {name: value.clone() for name, value in adapter_weights(model).items()}


@pytest.mark.parametrize(
    ("args", "learning_rate"),
    [
        ({"learning_rate": 2e-4, "warmup_steps": 5, "lr_scheduler_type": "cosine"}, 2e-4),
        ({"learning_rate": LARGE}, LARGE),
        ({"learning_rate": 2e-4, "optim": "sgd"}, None),
    ],
    ids=str,
)
def test_a_trainer_says_its_rate(args: dict[str, Any], learning_rate: float | None, tmp_path: Path) -> None:
    callback, seen = LoraDACallback(LoraDAConfig(samples=SAMPLES)), Seen()
    plain(with_lora(tiny_llama()), ROWS, tmp_path, callback, seen, **args).train()
    expected = with_lora(tiny_llama())
    rate = started(expected, learning_rate).rate
    assert callback.report is not None and callback.report.rate == rate
    assert (rate is None) == (learning_rate is None)
    assert all(torch.equal(seen.adapter[name], value) for name, value in adapter_weights(expected).items())
    saved = json.loads((tmp_path / REPORT_FILE).read_text(encoding="utf-8"))["rate"]
    assert saved == (None if rate is None else vars(rate))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match_rate": "yes"}, r"^lora_da\.match_rate is 'yes'; set true or false$"),
        ({"match_rate": True, "first_step": "none"}, r"^lora_da\.match_rate is True, .* set `first_step: measured`"),
        ({"match_rate": True, "gamma": 5.0}, r"^lora_da\.match_rate is True, .* no gamma$"),
        ({"match_rate": True, "method": "filet"}, r"^lora_da\.match_rate is True, which method filet has no use for"),
    ],
    ids=str,
)
def test_settings_that_go_against_it(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraDAError, match=message):
        LoraDAConfig(**settings)


def test_one_that_is_unusable_is_refused() -> None:
    for learning_rate in (0.0, -1.0, math.nan, math.inf, "2e-4", True):
        model = with_lora(tiny_llama(), lora_alpha=8)
        before = adapter_weights(model)
        with pytest.raises(LoraDAError, match=r"^learning_rate is .*; set a number above 0"):
            started(model, learning_rate)  # type: ignore[arg-type]
        assert all(torch.equal(before[name], value) for name, value in adapter_weights(model).items())
