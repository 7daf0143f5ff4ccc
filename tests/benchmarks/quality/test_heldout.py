"""Loss and ranking on held-out rows are the model's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from letters import sweep
from peft import get_peft_model
from words import WORDS

from benchmarks.errors import BenchmarkError
from benchmarks.qlora import lora_config
from benchmarks.quality.corpora import split_rows
from benchmarks.quality.heldout import Heldout, find_choice

pytestmark = [pytest.mark.once, pytest.mark.slow]


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
