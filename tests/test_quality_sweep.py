"""The quality benchmark's runs: cells differ in their start alone, and leave the base as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from models import tiny_llama
from test_rows import WORDS, as_lines, tokenizer

from benchmarks.quality import run
from benchmarks.quality.base import load_base
from benchmarks.quality.heldout import Choice, Heldout
from benchmarks.quality.starts import control
from benchmarks.quality.sweep import read_sweep
from benchmarks.quality.tasks import choice_tokens, read_rows
from lora_da.adapter import find_adapter

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
    "base": "nf4",
    "tasks": {"letters": {"train": "train.jsonl", "test": "test.jsonl", "choices": list(CHOICES)}},
    "starts": {
        "plain": {"method": "plain"},
        "ours": {"method": "lora_da", "rates": [0.01]},
        "again": {"method": "plain", "rates": [0.01]},
    },
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
    return read_sweep(path)


@pytest.fixture(scope="module")
def base(folder):
    return load_base(str(folder / "model"), "nf4", torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(folder, base):
    """Of the sweep's first seed at the larger rate: the lines, the batches each saw, and whether the base changed."""
    before = {name: value.clone() for name, value in base[0].state_dict().items()}
    seen, lines = {}, {}
    original = run.collate
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DA_DATA", str(folder))
        for cell in sweep(folder).cells:
            if cell.seed == 3 and cell.rate == 0.01:
                batches: list[list[list[int]]] = []
                patch.setattr(
                    run,
                    "collate",
                    lambda rows, into=batches: into.append([r["input_ids"] for r in rows]) or original(rows),
                )
                lines[cell.start] = run.Runner(*base).run(cell, sweep(folder).tasks["letters"])
                seen[cell.start] = batches[-cell.steps :]
    after = base[0].state_dict()
    return lines, seen, all(torch.equal(after[name], value) for name, value in before.items())


def test_every_cell_is_asked_for_once(folder):
    cells = sweep(folder).cells
    assert len({cell.key for cell in cells}) == len(cells) == 2 * (2 + 1 + 1)
    assert [(c.start, c.rate) for c in cells if c.seed == 3] == [
        ("plain", 0.001),
        ("plain", 0.01),
        ("ours", 0.01),
        ("again", 0.01),
    ]


@pytest.mark.parametrize("change", [{"step": 5}, {"split": "train"}])
def test_a_sweep_that_nothing_reads_is_refused(folder, change):
    with pytest.raises(ValueError, match="too many|split is 'train'"):
        sweep(folder, **change)


def test_the_same_start_gives_the_same_run(finished):
    lines, _, _ = finished
    assert lines["plain"]["heldout"] == lines["again"]["heldout"]
    assert lines["plain"]["train_loss"] == lines["again"]["train_loss"]
    assert lines["plain"]["heldout"][1:] != lines["ours"]["heldout"][1:]


def test_all_starts_see_the_same_batches(finished):
    _, seen, _ = finished
    assert len(seen["plain"]) == SWEEP["steps"] and all(len(batch) == SWEEP["batch"] for batch in seen["plain"])
    assert seen["plain"] == seen["ours"]


def test_the_base_is_as_it_was(finished):
    assert finished[2]


def test_a_line_holds_what_happened(finished):
    line = finished[0]["ours"]
    assert json.loads(json.dumps(line))["cell"]["start"] == "ours"
    assert [step for step, _ in line["heldout"]] == list(range(SWEEP["steps"] + 1))
    assert len(line["train_loss"]) == SWEEP["steps"]
    assert line["initialized"] == 14 and finished[0]["plain"]["initialized"] is None
    assert finished[0]["plain"]["heldout"][0][1] == pytest.approx(line["base_loss"])
    assert line["heldout"][0][1] != line["base_loss"]  # a step downhill


def test_heldout_rows_are_never_trained_on(data, base):
    task, rows = sweep(data).tasks["letters"], {}
    for split in ("development", "test"):
        found = read_rows(task, base[1], split, 20, 4, 100, seed=0)
        rows[split] = {tuple(row["input_ids"]) for row in found.heldout}
        assert not rows[split] & {tuple(row["input_ids"]) for row in found.train}
        assert len(found.train) == 100
    assert not rows["development"] & rows["test"]


def test_too_few_rows_are_refused(data, base):
    with pytest.raises(ValueError, match="letters: 6 held-out rows of up to 20 tokens, 7 asked for"):
        read_rows(sweep(data).tasks["letters"], base[1], "test", 20, 7, 10, seed=0)


def test_loss_and_ranking_are_the_models_own(data, base):
    model, words = base
    rows = read_rows(sweep(data).tasks["letters"], words, "test", 20, 6, 2, seed=0).heldout
    position, tokens = choice_tokens(CHOICES, words)
    assert (position, tokens) == (1, [WORDS.index("d"), WORDS.index("e")])
    adapted = run.get_peft_model(model, run.adapter_config(sweep(data).cells[0]))
    try:
        loss, accuracy = Heldout(rows, Choice(position, tuple(tokens)), torch.device("cpu")).measure(adapted)
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
    heldout = Heldout(rows, Choice(position, tuple(tokens)), torch.device("cpu"))
    assert heldout.majority == max(gold.count(t) for t in tokens) / len(gold)


@pytest.mark.parametrize("kind", ["zero_B", "random_A", "plain_scale"])
def test_a_control_keeps_what_it_says(data, base, kind):
    cell = dataclasses.replace(sweep(data).cells[0], method="lora_da")
    adapted = run.get_peft_model(base[0], run.adapter_config(cell))
    try:
        rows = read_rows(sweep(data).tasks["letters"], base[1], "development", 20, 4, 10, seed=0)
        run.Runner(*base)._start(adapted, rows, cell)
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
