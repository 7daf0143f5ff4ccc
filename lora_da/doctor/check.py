"""All rows of a dataset looked at, and the result as text, JSON and a picture. Nothing is trained or changed."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lora_da.doctor.losses import Row, row_losses
from lora_da.doctor.outliers import standing_out
from lora_da.doctor.picture import draw
from lora_da.doctor.rows import look_at
from lora_da.errors import LoraDAError
from lora_da.findings import DataReport
from lora_da.memory import PeakMemory
from lora_da.samples.facts import RowFacts, row_facts
from lora_da.tasks import find_task
from lora_da.tasks.causal import Causal

Decode = Callable[[list[int]], str]

SHOWN = 64  # tokens of a row's end
CHECK_FILE, PICTURE_FILE = "lora_da_check.json", "lora_da_check.png"


def check(
    model: nn.Module,
    rows: Sequence[Row],
    max_length: int | None = None,
    ends: Iterable[int] = (),
    decode: Decode | None = None,
    show_progress: bool = True,
) -> DataReport:
    """Look at all rows, and at the loss of each one that trains something.

    Args:
        model: a causal language model.
        rows: `input_ids` and `labels` of each.
        max_length: at which longer rows were cut off; if None, see `lora_da.doctor.rows.look_at`.
        ends: tokens that end an answer.
        decode: makes text of token ids, for a row that was found to be shown by.
        show_progress: whether to show progress bars.

    Raises:
        LoraDAError: another kind of model; a row without these, or that does not fit in memory.
    """
    task = find_task(model)
    if not isinstance(task, Causal):
        raise LoraDAError(f"{type(model).__name__} is no causal language model, which the rows are checked with")
    bar = tqdm(range(len(rows)), desc="LoRA-DA, reading the rows", disable=not show_progress)
    facts = [_facts(number, rows[number]) for number in bar]
    report = look_at(facts, max_length, ends)
    repeated = set(report.rows_by("duplicate"))
    run = [row for row in facts if row.loss_tokens and row.row not in repeated]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    losses = row_losses(task, rows, run, device, show_progress)
    found, why_not = standing_out(losses)
    unknown = report.unknown | ({"loss": why_not, "prompt": why_not} if why_not else {})
    findings = [
        dataclasses.replace(finding, text=_end_of(rows[finding.row], decode)) for finding in [*report.findings, *found]
    ]
    return dataclasses.replace(report, findings=findings, losses=losses, unknown=unknown)


def check_and_save(look: Callable[[], DataReport], folder: Path, device: torch.device) -> list[str]:
    """Check, and write what was found beside the text that is returned, line by line.

    Args:
        look: makes the report.
        folder: for the files; made if it is not there.
        device: whose memory is told.

    Raises:
        LoraDAError: of the check; a file cannot be written.
    """
    began, memory = time.perf_counter(), PeakMemory(device)
    if folder.exists() and not folder.is_dir():
        raise LoraDAError(f"the output folder {folder} is a file; choose another one")
    report = look()
    cost = {"seconds": time.perf_counter() - began, "peak_memory_gib": memory.gib(), "memory_of": memory.name}
    file, picture = folder / CHECK_FILE, folder / PICTURE_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(as_json(report) | cost, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise LoraDAError(f"{file} cannot be written: {error}") from error
    why_not = draw(report, picture)
    spent = f"{cost['seconds']:.1f} s, peak {memory.name} memory {cost['peak_memory_gib']:.1f} GiB"
    drawn = f"not drawn: {why_not}" if why_not else str(picture)
    return [*report.text(), f"looked at in {spent}", f"rows and figures: {file}", f"picture: {drawn}"]


def ends_of(tokenizer: Any, model: Any) -> set[int]:
    """Tokens that end an answer; a chat model's configuration may name more of them than its tokenizer."""
    generated = model.generation_config.eos_token_id
    of_model = generated if isinstance(generated, list) else [generated]
    return {token for token in (tokenizer.eos_token_id, *of_model) if token is not None}


def as_json(report: DataReport) -> dict[str, Any]:
    """The report for programs; a row's losses are a list of row, loss tokens, mean loss, and help of its prompt."""
    fields = dataclasses.asdict(report)
    losses = [(row.row, row.loss_tokens, row.mean, row.help) for row in report.losses]
    return fields | {"loss": report.loss, "losses": losses}


def _end_of(row: Row, decode: Decode | None) -> str:
    return "" if decode is None else decode(list(row["input_ids"])[-SHOWN:])


def _facts(number: int, row: Row) -> RowFacts:
    missing = [name for name in ("input_ids", "labels") if name not in row]
    if missing:
        raise LoraDAError(f"row {number} has no `{missing[0]}` (keys seen: {', '.join(row)})")
    if len(row["input_ids"]) != len(row["labels"]):
        raise LoraDAError(f"row {number} has {len(row['input_ids'])} `input_ids` and {len(row['labels'])} `labels`")
    return row_facts(number, row["input_ids"], row["labels"])
