"""What is held out is never trained on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from letters import LETTERS, TEST, TRAIN, sweep
from words import WORDS, as_lines

from benchmarks.errors import BenchmarkError
from benchmarks.quality.corpora import Corpus, input_of, split_rows

pytestmark = [pytest.mark.once, pytest.mark.slow]


def numbers(text):
    return tuple(map(WORDS.index, text.split()))


def ids_of_input(text):
    return numbers(f"<user> {text} <assistant>")


def ids(row):
    return tuple(row["input_ids"])


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


def test_no_input_of_a_held_out_row_is_trained_on(data, base):
    """Every input has three answers; in the test file are two of the same inputs, with other answers."""
    inputs = [" ".join(LETTERS[n:] + LETTERS[:n]) for n in range(7)] + ["a a b", "b b a", "c c a"]
    several = [{"asked": text, "said": said} for text in inputs for said in ("c d", "c e", "c d e")]
    as_lines(data / "several.jsonl", several)
    as_lines(data / "others.jsonl", [{"asked": text, "said": "e e"} for text in inputs[:2]])
    corpus = Corpus("several", "several.jsonl", "others.jsonl", "asked", "said")
    found = {split: split_rows(corpus, base[1], split, 20, 2, 100, seed=0) for split in ("development", "test")}
    held = {ids(row) for rows in found.values() for row in rows.heldout}
    never = {asked for asked in map(ids_of_input, inputs) if any(row[: len(asked)] == asked for row in held)}
    assert 3 <= len(never) <= 4
    left = {ids_of_input(text) for text in inputs} - never
    for rows in found.values():
        assert {input_of(row) for row in rows.train} == left
        assert len({ids(row) for row in rows.train}) == 3 * len(left)


def test_where_inputs_are_distinct_the_rows_are_split_as_results_on_file_were(data, base):
    """Oracle: the first of the fixed order are held out, and the others are drawn from, by rows."""
    corpus = sweep(data).corpora["letters"]
    found = split_rows(corpus, base[1], "development", 20, 4, 36, seed=5)
    chats = [(*ids_of_input(row["question"]), *numbers(f"{row['answer']} <eos>")) for row in TRAIN]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = torch.randperm(36, generator=torch.Generator().manual_seed(5)).tolist()
    assert sorted(map(ids, found.heldout)) == sorted(chats[n] for n in order[:4])
    assert list(map(ids, found.train)) == [chats[order[4:][n]] for n in drawn]


def test_fields_are_read_by_their_names(data, base):
    letters = sweep(data).corpora["letters"]
    as_lines(data / "others.jsonl", [{"asked": row["question"], "said": row["answer"]} for row in TEST])
    as_lines(data / "named.jsonl", [{"asked": row["question"], "said": row["answer"]} for row in TRAIN])
    named = dataclasses.replace(letters, train="named.jsonl", test="others.jsonl", input="asked", output="said")
    found, known = (split_rows(corpus, base[1], "test", 20, 4, 10, seed=0) for corpus in (named, letters))
    assert found == known
    with pytest.raises(BenchmarkError, match="letters: rows of named.jsonl have no 'asks', but asked, said"):
        split_rows(dataclasses.replace(named, input="asks"), base[1], "development", 20, 4, 10, seed=0)
    with pytest.raises(BenchmarkError, match="letters: has one of `input` and `output`"):
        dataclasses.replace(named, output=None)
    others = ({"input": "said", "output": "asked"}, {"input": None, "output": None})
    assert len({named.digest(), *(dataclasses.replace(named, **fields).digest() for fields in others)}) == 3


def test_too_few_rows_are_refused(data, base):
    with pytest.raises(BenchmarkError, match="letters: 6 held-out rows of up to 20 tokens, 7 asked for"):
        split_rows(sweep(data).corpora["letters"], base[1], "test", 20, 7, 10, seed=0)
