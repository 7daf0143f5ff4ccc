"""Share of held-out rows whose answer the model generates word for word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.corpora import input_of
from benchmarks.quality.heldout import BATCH
from benchmarks.tokenized_rows import Row
from lora_da.samples.tokens import IGNORED

LONGEST = 64  # tokens of an answer


@torch.no_grad()
def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> float:
    """Generate the rows' answers greedily, up to their end or 64 tokens; the share that equals the true ones as text,
    spaces around it aside. The model stays in the mode it is in; see `Heldout.measure`."""
    right = 0
    for n in range(0, len(rows), BATCH):
        batch = rows[n : n + BATCH]
        answers = [[label for label in row["labels"] if label != IGNORED] for row in batch]
        generated = _generate(model, tokenizer, [input_of(row) for row in batch])
        right += sum(_text(a, tokenizer) == _text(b, tokenizer) for a, b in zip(answers, generated, strict=True))
    return right / len(rows)


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Sequence[Sequence[int]]
) -> list[list[int]]:
    width = max(map(len, inputs))
    pad = tokenizer.eos_token_id  # hidden by the mask on the left, and on the right what ends an answer
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in inputs], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in inputs], device=model.device)
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=LONGEST,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    answers: list[list[int]] = found[:, width:].tolist()
    return answers


def _text(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode what is before the end of the answer."""
    end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    return str(tokenizer.decode(tokens[:end])).strip()
