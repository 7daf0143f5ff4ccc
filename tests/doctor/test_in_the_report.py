"""What an initialisation has read of the data goes into its report, and into its line where it matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import adapted, classifier, in_batches, single
from models import documents, few_tokens, packed, pad, tiny_llama, with_lora
from torch.utils.data import DataLoader

from lora_da import InitReport, LoraDAConfig, initialize_lora_da_weights

SAMPLES = 12
ROWS = few_tokens(documents(40, shortest=8, longest=20))
MASKED, REPEATED = (2, 7), {9: 3}


def planted() -> list[dict[str, list[int]]]:
    rows = [dict(row) for row in ROWS]
    for row in MASKED:
        rows[row]["labels"] = [-100] * len(rows[row]["labels"])
    for row, of in REPEATED.items():
        rows[row] = rows[of]
    return rows


def initialised(data: Any, model: Any = None, **settings: Any) -> InitReport:
    config = LoraDAConfig(samples=SAMPLES, first_step="none", **settings)
    return initialize_lora_da_weights(model or with_lora(tiny_llama()), data, config, show_progress=False)


def loader(rows: Any) -> DataLoader[Any]:
    return DataLoader(rows, 4, collate_fn=pad)


def test_planted_rows_are_counted_and_said(tmp_path: Path) -> None:
    report = initialised(loader(planted()))
    assert report.data is not None and report.data.rows == SAMPLES + len(MASKED)
    read = planted()[: report.data.rows]
    assert report.data.tokens == sum(len(row["input_ids"]) for row in read)
    assert report.data.rows_by("masked") == list(MASKED) and report.data.rows_by("duplicate") == list(REPEATED)
    assert report.line().splitlines()[-1] == (
        "LoRA-DA: of 14 rows that were read, 2 have no token that carries loss (rows 2, 7); "
        "1 repeats an earlier one (row 9)"
    )
    saved = json.loads(report.save(tmp_path).read_text(encoding="utf-8"))["data"]
    assert {"row": 9, "reason": "duplicate", "figures": {"of": 3}, "text": ""} in saved["findings"]


@pytest.mark.parametrize("data", [loader(ROWS), [pad(ROWS[n : n + 5]) for n in range(0, 40, 5)], [packed(ROWS)]])
def test_nothing_is_said_of_clean_rows(data: Any) -> None:
    report = initialised(data, population_size=40)
    assert report.data is not None and report.data.findings == [] and report.line().count("\n") == 0


def test_batches_that_are_ready_are_counted_by_rows() -> None:
    report = initialised([pad(planted()[n : n + 5]) for n in range(0, 40, 5)])
    assert report.data is not None
    assert report.data.rows_by("masked") == list(MASKED) and report.data.rows_by("duplicate") == list(REPEATED)


def test_random_rows_keep_their_indices() -> None:
    """Rows are named as the dataset has them, not as they were drawn."""
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS[:20]]
    report = initialised(loader(masked + ROWS[20:]), seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    assert report.data is not None
    read = order[: report.data.rows]
    assert report.data.rows_by("masked") == [row for row in read if row < 20]
    assert 0 < len(report.data.findings) < len(read)


def test_a_start_from_the_cache_says_it_too(tmp_path: Path) -> None:
    reports = [initialised(loader(planted()), cache_dir=str(tmp_path)) for _ in range(2)]
    assert [report.from_cache for report in reports] == [False, True] and reports[0].data == reports[1].data


def test_other_tasks_are_not_looked_at() -> None:
    report = initialised(in_batches(single(12), 4), adapted(classifier("Llama")), population_size=12)
    assert report.data is None and report.line().count("\n") == 0
