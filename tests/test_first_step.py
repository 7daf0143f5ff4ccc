"""How far along the solved direction training starts: the losses are the model's own on documents that nobody has seen,
and nothing but lora_B's length depends on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import adapted, classifier, in_batches, single
from mixtures import mixture
from models import (
    PREFIX,
    QUANTISED,
    adapter_weights,
    checkpoint,
    documents,
    few_tokens,
    packed,
    pad,
    tiny_llama,
    tiny_quantized,
    with_lora,
)
from peft import PeftModel
from picture import differences, picture
from planning import recorded
from settings import as_solved
from tolerances import LOSS, TURNED
from torch import Tensor
from torch.utils.data import DataLoader
from trainers import worst_difference

import lora_da.first_step
from lora_da import LoraDAConfig, LoraDAError, export_initial_adapter, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.first_step import DOCUMENTS, FIRST_LENGTH, MOST_TRIALS, search
from lora_da.statistics import LayerStatistics

SAMPLES, OTHERS = 12, 8
DAMPING = 0.1  # of the default preset
ROUNDED = 3e-3  # 8-bit layers quantise what they read, a batch at once


ROWS = few_tokens(documents(SAMPLES + OTHERS, shortest=6, longest=14))


def loader(rows: Any = ROWS, size: int = 4) -> DataLoader[Any]:
    return DataLoader(rows, size, collate_fn=pad)


def initialised(model: PeftModel, data: Any = None, **settings: Any) -> Any:
    config = LoraDAConfig(samples=SAMPLES, **settings)
    return initialize_lora_da_weights(model, data or loader(), config, show_progress=False)


def loss_of(model: PeftModel, rows: Any) -> float:
    """Transformers' own loss, a row after the other, per loss token."""
    total, n = 0.0, 0
    model.eval()
    for row in rows:
        batch = pad([row])
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(**batch).loss.item() * count
        n += count
    return total / n


class Direction:
    """Steps of all layers of one length in the Fisher that the statistics have, as an adapter was solved."""

    def __init__(self, solved: PeftModel, statistics: Mapping[str, LayerStatistics]) -> None:
        self.steps, squares = {}, []
        for layer in find_adapter(solved).layers:
            seen = statistics[layer.name.removeprefix(PREFIX)]
            assert seen.input_cov is not None and seen.output_fisher is not None
            cov, fisher = seen.input_cov.double(), seen.output_fisher.double()
            cov = cov + DAMPING * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype)
            fisher = fisher + DAMPING * fisher.mean()
            a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
            step = layer.scaling * b @ a
            b = b / (fisher.unsqueeze(1) * (step @ cov) * step).sum().sqrt()
            squares.append(torch.linalg.matrix_norm(layer.scaling * b @ a, 2).item() ** 2)
            self.steps[layer.name] = a, b
        self.unit = math.sqrt(sum(squares) / len(squares))

    def on(self, model: PeftModel, length: float) -> PeftModel:
        """A model that starts so far along it."""
        find_adapter(model).write({name: (a, b * length / self.unit) for name, (a, b) in self.steps.items()})
        return model


def quantised(folder: Path, kind: str) -> PeftModel:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return with_lora(tiny_quantized(folder, **QUANTISED[kind]))


def checkpointed() -> PeftModel:
    model = with_lora(tiny_llama())
    checkpoint(model.get_base_model())
    return model


MODELS: dict[str, Callable[[Path], PeftModel]] = {
    "float32": lambda _: with_lora(tiny_llama()),
    "alpha": lambda _: with_lora(tiny_llama(), lora_alpha=64),
    "rank pattern": lambda _: with_lora(tiny_llama(), rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 1}),
    "DoRA": lambda _: with_lora(tiny_llama(), use_dora=True),
    "dropout": lambda _: with_lora(tiny_llama(attention_dropout=0.3), lora_dropout=0.5),
    "head": lambda _: with_lora(tiny_llama(), target_modules=["q_proj", "down_proj", "lm_head"]),
    "experts": lambda _: with_lora(mixture(), target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"]),
    "checkpointing": lambda _: checkpointed(),
    **{kind: lambda folder, kind=kind: quantised(folder, kind) for kind in QUANTISED},  # type: ignore[misc]
}


@pytest.mark.compat("first-step")
@pytest.mark.parametrize("budget", [None, 1e-4])
@pytest.mark.parametrize("kind", MODELS)
def test_the_losses_are_the_models_own(kind: str, budget: float | None, tmp_path: Path) -> None:
    """At every length that was tried, with the direction as it is solved without measuring."""
    model = MODELS[kind](tmp_path)
    report = initialised(model, memory_budget=budget)
    found, step = adapter_weights(model), report.first_step
    assert (report.samples, step.documents) == (SAMPLES, OTHERS)

    solved = MODELS[kind](tmp_path)
    settings = as_solved(samples=SAMPLES, population_size=len(ROWS))
    with recorded() as statistics:
        initialize_lora_da_weights(solved, loader(ROWS[:SAMPLES]), settings, show_progress=False)
    direction = Direction(solved, statistics)
    for length, loss in step.tried:
        other = direction.on(MODELS[kind](tmp_path), length)
        close = ROUNDED if kind in QUANTISED else 20 * LOSS
        assert loss == pytest.approx(loss_of(other, ROWS[SAMPLES:]), rel=close), length
    losses = dict(step.tried)
    assert step.loss_before == losses[0.0] and step.loss_after == min(losses.values()) == losses[step.length]
    assert worst_difference(found, adapter_weights(direction.on(MODELS[kind](tmp_path), step.length))) < TURNED


def test_a_classifier_and_its_rows() -> None:
    report = initialised(adapted(classifier("Llama")), in_batches(single(SAMPLES + OTHERS), 4))
    assert report.first_step.documents == OTHERS and report.first_step.loss_after <= report.first_step.loss_before


@pytest.mark.parametrize(
    ("optimum", "best"),
    [(FIRST_LENGTH, 1), (2 * FIRST_LENGTH, 2), (4 * FIRST_LENGTH, 4), (FIRST_LENGTH / 4, 1 / 4), (1e-9, 0)],
)
def test_the_search_finds_the_bottom_within_a_factor_of_two(optimum: float, best: float) -> None:
    seen = []

    def loss_at(length: float) -> float:
        seen.append(length)
        return (length / optimum - 1) ** 2 if length else 1.0

    losses = search(loss_at)
    assert min(losses, key=losses.__getitem__) == best * FIRST_LENGTH
    assert seen[0] == 0.0 and len(seen) == len(set(seen)) == len(losses) <= 1 + MOST_TRIALS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_no_choice(bad: float) -> None:
    losses = search(lambda length: bad if length > FIRST_LENGTH / 8 else 1 - length)
    assert min(losses, key=losses.__getitem__) == FIRST_LENGTH / 16
    losses = search(lambda length: bad if length else 2.0)
    assert min(losses, key=losses.__getitem__) == 0.0 and len(losses) == 1 + MOST_TRIALS


def test_where_no_step_lowers_the_loss_the_model_starts_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lora_da.first_step, "search", lambda loss_at: {0.0: loss_at(0.0), 0.5: math.inf})
    model = with_lora(tiny_llama())
    report = initialize_lora_da_weights(model, loader(), LoraDAConfig(samples=SAMPLES))
    solved = with_lora(tiny_llama())
    initialised(solved, loader(ROWS[:SAMPLES]), first_step="gamma", population_size=len(ROWS))
    for name, value in adapter_weights(model).items():
        assert torch.equal(value, torch.zeros_like(value) if "lora_B" in name else adapter_weights(solved)[name])
    assert all(layer.relative_step == 0 for layer in report.layers.values())
    assert "which no first step lowers: lora_B is zero" in capsys.readouterr().out.splitlines()[1]


def test_none_is_the_solved_A_and_no_step() -> None:
    model, solved = with_lora(tiny_llama()), with_lora(tiny_llama())
    report = initialised(model, first_step="none")
    initialised(solved, first_step="gamma")
    assert report.samples == SAMPLES and report.first_step is None and len(report.line().splitlines()) == 1
    for name, value in adapter_weights(model).items():
        assert torch.equal(value, torch.zeros_like(value) if "lora_B" in name else adapter_weights(solved)[name])
    base = with_lora(tiny_llama())
    batch = pad(ROWS[:2])
    assert torch.equal(model.eval()(**batch).logits, base.eval()(**batch).logits)


def test_the_line_says_what_was_gained(capsys: pytest.CaptureFixture[str]) -> None:
    report = initialize_lora_da_weights(with_lora(tiny_llama()), loader(), LoraDAConfig(samples=SAMPLES))
    first, second = capsys.readouterr().out.splitlines()
    step = report.first_step
    assert first.startswith("LoRA-DA: initialised 14 of 14 layers from 12 samples")
    assert second == (
        f"LoRA-DA: loss on 8 other documents {step.loss_before:.3f} → {step.loss_after:.3f} before the first step; "
        "lora_A as it is, for no learning rate of Adam or its kin is known"
    )


@pytest.mark.parametrize(
    ("rows", "samples", "estimated", "looked_at"),
    [(100, 12, 12, DOCUMENTS), (20, 12, 12, 8), (13, 12, 10, 3), (12, 12, 9, 3), (12, 256, 9, 3), (2, 256, 1, 1)],
)
def test_documents_are_kept_from_the_estimate_where_there_are_no_others(
    rows: int, samples: int, estimated: int, looked_at: int
) -> None:
    """A quarter of them at most; those that the estimate sees are the first, as ever."""
    data = documents(rows, shortest=6, longest=9)
    model, truth = with_lora(tiny_llama()), with_lora(tiny_llama())
    report = initialize_lora_da_weights(model, loader(data), LoraDAConfig(samples=samples), show_progress=False)
    assert (report.samples, report.first_step.documents, report.population_size) == (estimated, looked_at, rows)
    settings = as_solved(samples=estimated, population_size=rows)
    initialize_lora_da_weights(truth, loader(data[:estimated]), settings, show_progress=False)
    found, expected = adapter_weights(model), adapter_weights(truth)
    assert all(torch.equal(found[name], expected[name]) for name in found if "lora_A" in name)


def test_one_batch_alone_leaves_nothing_to_measure_by(caplog: pytest.LogCaptureFixture) -> None:
    model = with_lora(tiny_llama())
    report = initialised(model, [pad(ROWS[:SAMPLES])])
    assert report.samples == SAMPLES and report.first_step is None
    assert not any(value.any() for name, value in adapter_weights(model).items() if "lora_B" in name)
    (note,) = report.notes
    assert "lora_B is zero" in note and "first_step: gamma" in note and note in caplog.text


def test_the_rest_of_a_packed_row_is_nobodys() -> None:
    """Documents beyond the samples in the row that the last sample is in."""
    rows = [packed(documents((5, 6, 7), seed=n)) for n in range(4)]
    report = initialize_lora_da_weights(with_lora(tiny_llama()), rows, LoraDAConfig(samples=4), show_progress=False)
    assert (report.samples, report.first_step.documents) == (4, 6)


FAULTS = {
    "RuntimeError": (RuntimeError("planted"), "planted"),
    "interrupt": (KeyboardInterrupt("planted"), "planted"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_after_a_fault_the_model_is_as_it_was(fault: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error, message = FAULTS[fault]
    model, calls = with_lora(tiny_llama()), [0]
    original = lora_da.first_step._loss

    def failing(*args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(*args)

    monkeypatch.setattr(lora_da.first_step, "_loss", failing)
    before = picture(model)
    with pytest.raises(type(error), match=message):
        initialised(model)
    assert calls[0] == call and differences(before, picture(model)) == []


def test_nothing_but_the_adapter_changes() -> None:
    model = with_lora(tiny_llama(), use_dora=True)
    before, random = picture(model), torch.get_rng_state()
    initialised(model)
    assert torch.equal(random, torch.get_rng_state())
    assert all(".lora_" in name and name.endswith(": bits") for name in differences(before, picture(model)))


@contextmanager
def seen_by_the_body(model: PeftModel, monkeypatch: pytest.MonkeyPatch, most: int = 1000) -> Iterator[list[int]]:
    """How many rows the lowest block reads at once while losses are measured; more than `most` do not fit."""
    rows: list[int] = []
    original = lora_da.first_step._loss

    def look(_block: Any, args: tuple[Tensor]) -> None:
        rows.append(len(args[0]))
        if rows[-1] > most:
            raise torch.OutOfMemoryError("planted")

    def watched(*args: Any) -> Tensor:
        handle = model.get_base_model().model.layers[0].register_forward_pre_hook(look)
        try:
            return original(*args)
        finally:
            handle.remove()

    with monkeypatch.context() as patch:
        patch.setattr(lora_da.first_step, "_loss", watched)
        yield rows


def test_memory_that_runs_out_makes_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = initialised(with_lora(tiny_llama())).first_step
    model = with_lora(tiny_llama())
    with seen_by_the_body(model, monkeypatch, most=1) as rows:
        found = initialised(model).first_step
    assert max(rows) > 1 and rows.count(1) == OTHERS * len(found.tried)
    assert [loss for _, loss in found.tried] == pytest.approx([loss for _, loss in expected.tried], rel=LOSS)


def test_a_row_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny_llama())

    def none_fits(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    original = lora_da.first_step._loss

    def failing(task: Any, *args: Any) -> Tensor:
        monkeypatch.setattr(type(task), "backward", none_fits)
        return original(task, *args)

    monkeypatch.setattr(lora_da.first_step, "_loss", failing)
    before = picture(model)
    with pytest.raises(
        LoraDAError, match=r"while the first step is measured, with rows of \d+ tokens.*first_step: gamma"
    ):
        initialised(model)
    assert differences(before, picture(model)) == []


def test_the_cost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of a few documents: the base's, and one for each length."""
    model = with_lora(tiny_llama())
    rows = few_tokens(documents(SAMPLES + 2 * DOCUMENTS))
    with seen_by_the_body(model, monkeypatch) as calls:
        step = initialised(model, loader(rows)).first_step
    assert step.documents == DOCUMENTS and sum(calls) == DOCUMENTS * len(step.tried) <= DOCUMENTS * (1 + MOST_TRIALS)
    assert step.length > 0 and step.seconds > 0


def test_a_stored_choice_is_taken_without_a_forward(tmp_path: Path) -> None:
    def run(rows: Any = ROWS, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
        model = with_lora(tiny_llama())
        return initialised(model, loader(rows), cache_dir=str(tmp_path), **settings), adapter_weights(model)

    first, factors = run()
    second, again = run()
    assert second.from_cache and second.first_step == first.first_step
    assert all(torch.equal(factors[name], again[name]) for name in factors)
    assert not run(first_step="none")[0].from_cache
    others = [*ROWS[:SAMPLES], *documents(OTHERS, shortest=6, longest=14, seed=5)]
    assert not run(others)[0].from_cache


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_in_the_export(tmp_path: Path) -> None:
    model = with_lora(tiny_llama())
    config = LoraDAConfig(samples=SAMPLES)
    report = export_initial_adapter(model, loader(), tmp_path / "out", config, show_progress=False)
    assert report.first_step.length > 0
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert loss_of(loaded, ROWS[SAMPLES:]) == pytest.approx(report.first_step.loss_after, rel=20 * LOSS)


@pytest.mark.parametrize("preset", ["reference", "paper"])
def test_a_published_step_is_measured_where_that_is_asked_for(preset: str) -> None:
    published, asked = (with_lora(tiny_llama()) for _ in range(2))
    assert initialised(published, preset=preset).first_step is None
    report = initialised(asked, preset=preset, first_step="measured")
    assert report.first_step.documents == OTHERS
    assert report.first_step.loss_after <= report.first_step.loss_before


def test_the_report_has_it_as_json(tmp_path: Path) -> None:
    import json

    report = initialised(with_lora(tiny_llama()))
    saved = json.loads(report.save(tmp_path).read_text())["first_step"]
    assert saved == json.loads(json.dumps(dataclasses.asdict(report.first_step)))
