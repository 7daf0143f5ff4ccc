"""Answers count as right if they are those that the model gives by itself, token by token."""

from __future__ import annotations

import pytest
import torch
from models import tiny_llama
from words import WORDS, tokenizer

from benchmarks.quality.exact_match import LONGEST, exact_match
from lora_da.samples.tokens import IGNORED

pytestmark = [pytest.mark.once, pytest.mark.slow]

EOS = WORDS.index("<eos>")


@torch.no_grad()
def said(model, asked: list[int], longest: int) -> list[int]:
    """Oracle: one row, no padding, no cache, the likeliest token each time, until the end of the answer."""
    ids = list(asked)
    while len(ids) < len(asked) + longest and EOS not in ids[len(asked) :]:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(asked) :]


def row(asked: list[int], answer: list[int]) -> dict[str, list[int]]:
    return {"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer}


@pytest.fixture(scope="module")
def model():
    """Says after some tokens that its answer ends."""
    model = tiny_llama(vocab_size=len(WORDS))
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 1.5
    return model


def test_what_the_model_says_counts_and_nothing_else(model):
    words, asked = tokenizer(), [[4, *range(7, 7 + n), 5] for n in range(1, 8)] * 3  # of several lengths: two batches
    own = [said(model, ids, LONGEST) for ids in asked]
    ended = [answer for answer in own if answer[-1] == EOS]
    assert 0 < len(ended) < len(own)  # by their own end, and by the limit
    rows = [row(ids, answer) for ids, answer in zip(asked, own, strict=True)]
    assert exact_match(model, words, rows) == 1.0
    wrong = [row(ids, [8 if answer[0] == 7 else 7, *answer[1:]]) for ids, answer in zip(asked[:4], own, strict=False)]
    assert exact_match(model, words, [*wrong, *rows[4:]]) == pytest.approx(1 - 4 / 21)


def test_an_answer_longer_than_the_limit_is_none(model):
    asked = next([4, *range(7, 7 + n), 5] for n in range(1, 8) if EOS not in said(model, [4, *range(7, 7 + n), 5], 70))
    assert exact_match(model, tokenizer(), [row(asked, said(model, asked, LONGEST + 1))]) == 0.0
    assert exact_match(model, tokenizer(), [row(asked, said(model, asked, LONGEST))]) == 1.0


def test_what_follows_the_end_of_an_answer_does_not_count(model):
    asked = next([4, *range(7, 7 + n), 5] for n in range(1, 8) if EOS in said(model, [4, *range(7, 7 + n), 5], LONGEST))
    answer = said(model, asked, LONGEST)
    assert exact_match(model, tokenizer(), [row(asked, [*answer, 9])]) == 1.0
    assert exact_match(model, tokenizer(), [row(asked, [*answer[:-1], 9, EOS])]) == 0.0
