"""Tokenizers of whole words, a vocabulary of a few letters, and rows of them in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

WORDS = "<pad> <bos> <eos> <unk> <user> <assistant> <system> a b c d e f g".split()
LETTERS = WORDS[-7:]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] }}"
    "{{ ' <eos> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def word_tokenizer(words: Sequence[str], template: str | None, begins: bool = False) -> PreTrainedTokenizerFast:
    """One token for a word, numbered in their order; `begins` puts <bos> before every text."""
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        tokens.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=template, **special)


def tokenizer(template: str | None = TEMPLATE, begins: bool = False) -> PreTrainedTokenizerFast:
    """Knows `WORDS`."""
    return word_tokenizer(WORDS, template, begins)


def as_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines, with an empty one at the end."""
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
