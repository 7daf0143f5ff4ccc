"""What stands in for SmolLM2 and for the quality benchmark's tasks at toy size: nothing is read or downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] }}"
    "{{ ' <eos> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SWEEP: dict[str, Any] = {
    "split": "development",
    "base": "nf4",
    "adapters": "float32",
    "steps": 2,
    "batch": 2,
    "length": 32,
    "heldout_rows": 4,
    "curve_rows": 2,
    "prediction": False,
    "tasks": {"letters": {"train": "train.jsonl", "test": "test.jsonl"}},
    "starts": {"plain": {"method": "plain"}, "default": {"method": "lora_da"}},
    "rates": [1e-3],
    "judged": [],
    "ranks": 2,
    "seeds": [0],
    "init_samples": 4,
}


def model_folder(folder: Path) -> Path:
    """Write a tiny Llama of random weights and a tokenizer of letters, where they are not there yet."""
    if not (folder / "tokenizer.json").exists():
        torch.manual_seed(0)
        words = {word: number for number, word in enumerate((*SPECIAL, *LETTERS))}
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)  # as it is quantised, and SmolLM2 kept
        tokens = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=TEMPLATE, **named).save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    """Letters at random, a few of them each."""
    chance = Random(seed)
    return [" ".join(chance.choices(LETTERS, k=chance.randint(4, 9))) for _ in range(count)]


def sweep(folder: Path) -> Path:
    """Write a sweep of two cells, its model and its rows; where the rows are is for LORA_DA_DATA."""
    for name, seed in (("train", 1), ("test", 2)):
        rows = [{"question": text, "answer": text[::-1]} for text in texts(24, seed)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "letters.yml"
    path.write_text(yaml.safe_dump({**SWEEP, "model": str(model_folder(folder / "model"))}), encoding="utf-8")
    return path
