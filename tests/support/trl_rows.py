"""Rows for SFTTrainer in its several formats, the tokens that count in them, and the adapter they start.

Import it after the skip for TRL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from models import IGNORED, Document
from settings import as_solved
from torch import Tensor
from trainers import FirstStep, base, sentences, sft, tokenizer

from lora_da import LoraDAConfig
from lora_da.report import InitReport
from trl_integration import LoraDAInitializer

COUNT, SAMPLES = 16, 10
CONFIG = as_solved(samples=SAMPLES)
ALL = as_solved(samples=COUNT)


def ids(words: Iterable[str]) -> list[int]:
    found: list[int] = tokenizer().convert_tokens_to_ids(list(words))
    return found


def prompts_and_completions() -> tuple[list[dict[str, Any]], list[Document]]:
    """Rows as TRL reads them, and as token ids with labels on the completion and its end."""
    texts, rows = [], []
    for prompt, completion in zip(sentences(COUNT, seed=1), sentences(COUNT, seed=2), strict=True):
        texts.append({"prompt": " ".join(prompt) + " ", "completion": " ".join(completion)})
        answer = ids([*completion, "<eos>"])
        rows.append({"input_ids": ids(prompt) + answer, "labels": [IGNORED] * len(prompt) + answer})
    return texts, rows


def conversations() -> tuple[list[dict[str, Any]], list[Document]]:
    """Two questions and answers each, and as token ids with labels on the answers and their ends."""
    texts, rows = [], []
    for turns in zip(*(sentences(COUNT, seed=seed, longest=5) for seed in range(4)), strict=True):
        roles = ["user", "assistant"] * 2
        texts.append(
            {"messages": [{"role": r, "content": " ".join(turn)} for r, turn in zip(roles, turns, strict=True)]}
        )
        row: Document = {"input_ids": [], "labels": []}
        for role, turn in zip(roles, turns, strict=True):
            header, said = ids([f"<{role}>"]), ids([*turn, "<eos>"] if role == "assistant" else turn)
            row["input_ids"] += header + said
            row["labels"] += [IGNORED] + (said if role == "assistant" else [IGNORED] * len(said))
        rows.append(row)
    return texts, rows


def at_first_step(
    folder: Path, tmp_path: Path, rows: Any, config: LoraDAConfig = CONFIG, **args: Any
) -> tuple[InitReport | None, dict[str, Tensor]]:
    """The report and the adapter at the first step."""
    initializer, first = LoraDAInitializer(config), FirstStep()
    sft(base(folder), rows, tmp_path, initializer, first, **args).train()
    return initializer.report, first.adapter


def counts(rows: Sequence[Document]) -> tuple[int, int, int]:
    """Documents, tokens and loss tokens, of documents that have any."""
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
    loss_tokens = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    return len(rows), sum(len(row["input_ids"]) for row in rows), loss_tokens


def counted(report: InitReport) -> tuple[int, int, int]:
    """What the report says of the same."""
    return report.samples, report.tokens, report.loss_tokens
