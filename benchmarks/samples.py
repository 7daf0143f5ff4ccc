"""The samples, the same in every row: questions of GSM8K, or random tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of what carries no loss

Row = dict[str, Tensor]  # input_ids and labels, (n,) each


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Right-padded to the longest row, (b, n) each."""
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED),
    }


def random_rows(samples: int, length: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Random tokens, all of which carry loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (samples, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def gsm8k_rows(samples: int, length: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The first training questions of GSM8K as chats cut to `length` tokens, loss on the answers.

    Raises:
        FileNotFoundError: LORA_DA_DATA names no folder with gsm8k_train.jsonl.
    """
    folder = os.environ.get("LORA_DA_DATA")
    path = Path(folder or ".") / "gsm8k_train.jsonl"
    if not folder or not path.exists():
        raise FileNotFoundError("set LORA_DA_DATA to a folder with gsm8k_train.jsonl (`question`, `answer`)")
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        question = [{"role": "user", "content": example["question"]}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        prompt_length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if prompt_length >= length:
            continue  # nothing of its answer would be left
        ids = tokenizer(f"{prompt}{example['answer']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        labels = [IGNORED] * prompt_length + ids[prompt_length:]
        rows.append({"input_ids": torch.tensor(ids[:length]), "labels": torch.tensor(labels[:length])})
        if len(rows) == samples:
            break
    return rows
