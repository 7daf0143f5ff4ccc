"""What is held out is never trained on."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from letters import TEST, TRAIN, sweep
from words import as_lines

from benchmarks.errors import BenchmarkError
from benchmarks.quality.corpora import split_rows

pytestmark = [pytest.mark.once, pytest.mark.slow]


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


def test_too_few_rows_are_refused(data, base):
    with pytest.raises(BenchmarkError, match="letters: 6 held-out rows of up to 20 tokens, 7 asked for"):
        split_rows(sweep(data).corpora["letters"], base[1], "test", 20, 7, 10, seed=0)
