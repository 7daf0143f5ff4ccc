"""Rows as token ids and labels: of GSM8K, or random."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.errors import BenchmarkError
from lora_da.export.files import load_rows
from lora_da.samples.tokens import IGNORED

Row = dict[str, list[int]]  # input_ids and labels


def data_file(name: str) -> Path:
    """Find a file in the folder LORA_DA_DATA, else in the current one; an absolute path is taken as it is.

    Raises:
        BenchmarkError: it is not there.
    """
    path = Path(os.environ.get("LORA_DA_DATA", "."), name)
    if not path.exists():
        raise BenchmarkError(f"there is no {path}; set LORA_DA_DATA to a folder with {name}")
    return path


def random_rows(samples: int, length: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Draw random tokens, all of which carry loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (samples, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def gsm8k_rows(samples: int, length: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Tokenise the first training questions of GSM8K as chats cut to `length` tokens, loss on the answers.

    Raises:
        BenchmarkError: LORA_DA_DATA names no folder with gsm8k_train.jsonl.
    """
    rows: list[Row] = []
    for example in load_rows(data_file("gsm8k_train.jsonl")):
        question = [{"role": "user", "content": example["question"]}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        prompt_length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if prompt_length >= length:
            continue  # nothing of its answer would be left
        ids = tokenizer(f"{prompt}{example['answer']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        labels = [IGNORED] * prompt_length + ids[prompt_length:]
        rows.append({"input_ids": ids[:length], "labels": labels[:length]})
        if len(rows) == samples:
            break
    return rows
