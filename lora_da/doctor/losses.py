"""The loss of every row, by forward passes alone: as training sees it, and of its answer without its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from tqdm.auto import tqdm

from lora_da.errors import LoraDAError
from lora_da.findings import RowLoss
from lora_da.memory import is_out_of_memory
from lora_da.model.state import reading_mode
from lora_da.samples.batch import BATCH_TOKENS, by_length
from lora_da.samples.facts import RowFacts
from lora_da.samples.rows import collate
from lora_da.samples.tokens import IGNORED
from lora_da.tasks.task import LanguageModel

Row = Mapping[str, Sequence[int]]  # `input_ids` and `labels`


def row_losses(
    task: LanguageModel, rows: Sequence[Row], facts: Sequence[RowFacts], device: torch.device, show_progress: bool
) -> list[RowLoss]:
    """Run rows through the model, those of like length together.

    Args:
        task: of the model, which is left as it was.
        rows: all of the data.
        facts: of those to run, each with a loss token.
        device: where they go.
        show_progress: whether to show a progress bar.

    Raises:
        LoraDAError: a row does not fit in memory, or its loss is not finite.
    """
    whole: dict[int, float] = {}
    alone: dict[int, float] = {}
    total = sum(row.tokens for row in facts)
    with (
        reading_mode(task.model),
        tqdm(total=total, desc="LoRA-DA, the loss of every row", unit=" tokens", disable=not show_progress) as bar,
    ):
        for group in by_length([row.tokens for row in facts], BATCH_TOKENS):
            read = {facts[number].row: rows[facts[number].row] for number in group}
            answers = {row: answer_alone(content) for row, content in read.items()}
            whole |= _losses(task, read, device)
            alone |= _losses(task, {row: answer for row, answer in answers.items() if answer is not None}, device)
            bar.update(sum(facts[number].tokens for number in group))
    broken = next((row for row, loss in [*whole.items(), *alone.items()] if not isfinite(loss)), None)
    if broken is not None:
        raise LoraDAError(
            f"the loss of row {broken} is not finite on this model; check its dtype (bf16 rather than fp16) and weights"
        )
    return [RowLoss(row.row, row.loss_tokens, whole[row.row], alone.get(row.row)) for row in facts]


def answer_alone(row: Row) -> Row | None:
    """The loss tokens of a row and the token before the first of them; None where that is the whole row."""
    ids, labels = row["input_ids"], row["labels"]
    answer = [place for place, label in enumerate(labels) if place and label != IGNORED]
    if len(answer) + 1 >= len(ids):
        return None
    places = [answer[0] - 1, *answer]
    return {"input_ids": [ids[n] for n in places], "labels": [IGNORED, *(labels[n] for n in answer)]}


def _losses(task: LanguageModel, rows: Mapping[int, Row], device: torch.device) -> dict[int, float]:
    """The summed loss of each row, by its number; in smaller batches where memory runs out."""
    found: dict[int, float] = {}
    pending = [list(rows)] if rows else []
    while pending:
        group = pending.pop()
        try:
            batch = task.read(collate([rows[row] for row in group]), len(group))
            losses = task.losses(batch, task.inputs(batch, device)).tolist()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(group) == 1:
                raise LoraDAError(
                    f"out of memory with row {group[0]} alone, of {len(rows[group[0]]['input_ids'])} tokens; free "
                    "memory, or set a smaller maximum length"
                ) from error
            pending += [group[: len(group) // 2], group[len(group) // 2 :]]
            continue
        found |= dict(zip(group, losses, strict=True))
    return found
