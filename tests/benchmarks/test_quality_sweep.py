"""The quality benchmark's runs: cells differ in their start alone, and leave the base as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from models import tiny_llama
from peft import get_peft_model
from test_rows import WORDS, as_lines, tokenizer

from benchmarks.errors import BenchmarkError
from benchmarks.qlora import lora_config
from benchmarks.quality import run
from benchmarks.quality.base import load_base
from benchmarks.quality.corpora import split_rows
from benchmarks.quality.heldout import Heldout, find_choice
from benchmarks.quality.results import append, read
from benchmarks.quality.starts import CONTROLS, control
from benchmarks.quality.sweep import read_sweep
from lora_da.adapter import find_adapter
from lora_da.config import PRESETS

pytestmark = [pytest.mark.once, pytest.mark.slow]

LETTERS = WORDS[-7:]
CHOICES = ("c d", "c e")
TRAIN = [{"question": " ".join(LETTERS[n % 7 :] + LETTERS[: n // 7]), "answer": CHOICES[n % 2]} for n in range(40)]
TEST = [{"question": f"g g {' '.join(LETTERS[n:])}", "answer": CHOICES[n % 3 == 0]} for n in range(6)]
SWEEP = {
    "split": "development",
    "steps": 5,
    "batch": 2,
    "length": 20,
    "heldout_rows": 4,
    "curve_rows": 2,
    "base": "nf4",
    "tasks": {"letters": {"train": "train.jsonl", "test": "test.jsonl", "choices": list(CHOICES)}},
    "starts": {
        "plain": {"method": "plain"},
        "ours": {"method": "lora_da", "rates": [0.01]},
        "again": {"method": "plain", "rates": [0.01]},
    },
    "judged": ["ours"],
    "rates": [0.001, 0.01],
    "ranks": 2,
    "seeds": [3, 4],
    "init_samples": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    tiny_llama(hidden_size=64, intermediate_size=128, vocab_size=len(WORDS)).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    as_lines(folder / "train.jsonl", TRAIN)
    as_lines(folder / "test.jsonl", TEST)
    return folder


@pytest.fixture
def data(folder, monkeypatch):
    monkeypatch.setenv("LORA_DA_DATA", str(folder))
    return folder


def sweep(folder: Path, **changes):
    path = folder / "sweep.yml"
    path.write_text(yaml.safe_dump({**SWEEP, "model": str(folder / "model"), **changes}, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DA_DATA", str(folder))
        return read_sweep(path)


@pytest.fixture(scope="module")
def runner(folder):
    return run.Runner(str(folder / "model"), "nf4", torch.device("cpu"))


@pytest.fixture(scope="module")
def base(folder):
    return load_base(str(folder / "model"), "nf4", torch.device("cpu"))


def trained(runner, folder, cell):
    """The result of a cell, and the batches that were trained on."""
    batches: list[list[list[int]]] = []
    original = run.collate

    def noting(rows):
        batches.append([row["input_ids"] for row in rows])
        return original(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DA_DATA", str(folder))
        patch.setattr(run, "collate", noting)
        result = runner.run(
            cell, sweep(folder).corpora["letters"], {"versions": {}, "hardware": "", "command": "", "commit": ""}
        )
    return result, batches[-cell.steps :]


@pytest.fixture(scope="module")
def finished(folder, runner):
    """Of the sweep's first seed at the larger rate, by start: results, batches; and whether the base has changed."""
    before = {name: value.clone() for name, value in runner._model.state_dict().items()}
    cells = [cell for cell in sweep(folder).cells if cell.seed == 3 and cell.rate == 0.01]
    runs = {cell.start: trained(runner, folder, cell) for cell in cells}
    after = runner._model.state_dict()
    same = after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    return {name: result for name, (result, _) in runs.items()}, {name: seen for name, (_, seen) in runs.items()}, same


def test_every_cell_is_asked_for_once(folder):
    cells = sweep(folder).cells
    assert len(set(cells)) == len(cells) == 2 * (2 + 1 + 1)
    assert [(c.start, c.rate) for c in cells if c.seed == 3] == [
        ("plain", 0.001),
        ("plain", 0.01),
        ("ours", 0.01),
        ("again", 0.01),
    ]


@pytest.mark.parametrize("change", [{"step": 5}, {"split": "train"}])
def test_a_sweep_that_nothing_reads_is_refused(folder, change):
    with pytest.raises(BenchmarkError, match="too many|split is 'train'"):
        sweep(folder, **change)


def test_the_same_start_gives_the_same_run(finished):
    lines, _, _ = finished
    assert lines["plain"].heldout == lines["again"].heldout
    assert lines["plain"].train_loss == lines["again"].train_loss
    assert lines["plain"].heldout[1:] != lines["ours"].heldout[1:]


def test_all_starts_see_the_same_batches(finished):
    _, seen, _ = finished
    assert len(seen["plain"]) == SWEEP["steps"] and all(len(batch) == SWEEP["batch"] for batch in seen["plain"])
    assert seen["plain"] == seen["ours"]


def test_the_base_is_as_it_was(finished):
    assert finished[2]


def test_a_result_holds_what_happened(finished, tmp_path):
    plain, ours = finished[0]["plain"], finished[0]["ours"]
    append(tmp_path / "results.jsonl", ours)
    assert read([tmp_path / "results.jsonl"]).results == (ours,)
    assert [step for step, _ in ours.heldout] == list(range(SWEEP["steps"] + 1))
    assert len(ours.train_loss) == SWEEP["steps"]
    assert ours.initialized == 14 and plain.initialized is None
    assert ours.heldout[0][1] < plain.heldout[0][1]  # a step downhill
    assert plain.base_loss == ours.base_loss and ours.final != ours.heldout[-1][1]  # on more rows
    assert set(ours.accuracy) == {"heldout", "majority"}
    # rounding turns the sign of gradients next to zero, and they are stepped along by sign
    assert finished[0]["again"].prediction == pytest.approx(plain.prediction, rel=0.1)
    assert ours.prediction != pytest.approx(plain.prediction, rel=0.1)


@pytest.mark.parametrize("method", ["eva", "pissa", "olora", "orthogonal", "corda"])
def test_starts_of_pefts_own_are_trained(folder, runner, method):
    cell = dataclasses.replace(sweep(folder).cells[0], start=method, method=method)
    result, _ = trained(runner, folder, cell)
    assert not result.diverged and result.own_base == (method != "eva")
    again, _ = trained(runner, folder, sweep(folder).cells[0])
    assert again.base_loss == result.base_loss  # the runner's own base is as it was
    assert result.heldout[0][1] == pytest.approx(again.heldout[0][1], rel=0.1)  # another rounding of the base at most


def test_heldout_rows_are_never_trained_on(data, base):
    corpus, rows = sweep(data).corpora["letters"], {}
    for split in ("development", "test"):
        found = split_rows(corpus, base[1], split, 20, 4, 100, seed=0)
        rows[split] = {tuple(row["input_ids"]) for row in found.heldout}
        assert not rows[split] & {tuple(row["input_ids"]) for row in found.train}
        assert len(found.train) == 100
    assert not rows["development"] & rows["test"]


def test_rows_that_are_in_the_test_file_too_are_not_trained_on(data, base, tmp_path, monkeypatch):
    as_lines(data / "both.jsonl", [*TRAIN, *TEST])
    corpus = dataclasses.replace(sweep(data).corpora["letters"], train="both.jsonl")
    found = split_rows(corpus, base[1], "test", 20, 6, 100, seed=0)
    seen = {tuple(row["input_ids"]) for row in found.train}
    assert seen and not seen & {tuple(row["input_ids"]) for row in found.heldout}


def test_other_data_or_other_defaults_are_other_cells(data, monkeypatch):
    before = sweep(data).cells
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "default", dataclasses.replace(PRESETS["default"], damping=0.5))
        changed = sweep(data).cells
    assert [a == b for a, b in zip(before, changed, strict=True)] == [cell.start != "ours" for cell in before]
    assert sweep(data).cells == before
    as_lines(data / "other.jsonl", TRAIN[:-1])
    tasks = {"letters": {**SWEEP["tasks"]["letters"], "train": "other.jsonl"}}
    assert not set(before) & set(sweep(data, tasks=tasks).cells)


def test_too_few_rows_are_refused(data, base):
    with pytest.raises(BenchmarkError, match="letters: 6 held-out rows of up to 20 tokens, 7 asked for"):
        split_rows(sweep(data).corpora["letters"], base[1], "test", 20, 7, 10, seed=0)


def test_loss_and_ranking_are_the_models_own(data, base):
    model, words = base
    rows = split_rows(sweep(data).corpora["letters"], words, "test", 20, 6, 2, seed=0).heldout
    choice = find_choice(sweep(data).corpora["letters"], words)
    assert (choice.position, choice.tokens) == (1, (WORDS.index("d"), WORDS.index("e")))
    tokens, heldout = choice.tokens, Heldout(rows, choice, torch.device("cpu"))
    adapted = get_peft_model(model, lora_config(sweep(data).cells[0].rank))
    try:
        loss, accuracy = heldout.measure(adapted.get_base_model())
        total, count, right, gold = 0.0, 0, 0, []
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                out = adapted(input_ids=ids, labels=labels)
            n = int((labels[:, 1:] != -100).sum())
            total, count = total + out.loss.item() * n, count + n
            at = next(k for k, label in enumerate(row["labels"]) if label in tokens)
            gold.append(row["labels"][at])
            right += max(tokens, key=lambda t: out.logits[0, at - 1, t].item()) == gold[-1]
    finally:
        adapted.unload()
    assert loss == pytest.approx(total / count, rel=1e-3)
    assert accuracy == right / len(rows)
    assert heldout.majority == max(gold.count(t) for t in tokens) / len(gold)


def test_choices_that_one_token_does_not_tell_apart_are_refused(data, base):
    corpus = dataclasses.replace(sweep(data).corpora["letters"], choices=("c d", "c d e"))
    with pytest.raises(BenchmarkError, match="'c d', 'c d e' are not told apart by one token"):
        find_choice(corpus, base[1])


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_keeps_what_it_says(data, runner, base, kind):
    cell = dataclasses.replace(sweep(data).cells[0], method="lora_da")
    rows = split_rows(sweep(data).corpora["letters"], base[1], "development", 20, 4, 10, seed=0)
    adapted, _ = runner._start(rows, cell)()
    try:
        chosen = {layer.name: layer.lora_A.detach().clone() for layer in find_adapter(adapted).layers}
        control(adapted, kind, seed=0)
        for layer in find_adapter(adapted).layers:
            a, before = layer.lora_A.detach(), chosen[layer.name]
            assert not layer.lora_B.any()
            direction = torch.nn.functional.cosine_similarity(a.flatten(), before.flatten(), dim=0)
            assert (direction > 0.999) == (kind != "random_A")
            expected = before.norm() if kind != "plain_scale" else (layer.plain_variance * a.numel()) ** 0.5
            assert a.norm().item() == pytest.approx(float(expected), rel=1e-5)
    finally:
        adapted.unload()
