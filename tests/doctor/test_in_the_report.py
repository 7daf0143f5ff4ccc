"""What an initialisation has read of the data goes into its report, and into its line where it matters."""

from __future__ import annotations

import copy
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


def own_gradient(model: Any, row: dict[str, list[int]]) -> float:
    """Mean over the row's loss tokens of the norm, by autograd of its own loss alone, in float64."""
    model = copy.deepcopy(model).double().eval()
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    hidden = model.model(ids).last_hidden_state
    targets = labels[0, 1:]
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden)[0, :-1], targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, hidden)
    return float(gradient.norm(dim=-1).sum() / (targets != -100).sum())


@pytest.mark.parametrize("settings", [{}, {"memory_budget": 1e-4}, {"preset": "reference", "damping": 0.1}], ids=str)
def test_gradients_are_each_rows_own(settings: dict[str, Any]) -> None:
    """In one pass, in segments, and where each row weighs the same; rows that train nothing have none."""
    base = tiny_llama()
    report = initialised(loader(planted()), with_lora(copy.deepcopy(base)), **settings)
    rows = [row for row in range(SAMPLES + len(MASKED)) if row not in MASKED]
    assert [row for row, _ in report.gradient_norms] == rows
    assert report.plan.startswith("streamed" if "memory_budget" in settings else "one pass")
    for row, gradient in report.gradient_norms:
        assert gradient == pytest.approx(own_gradient(base, planted()[row]), rel=1e-4)  # of float32


def test_a_gradient_that_stands_out_is_named(tmp_path: Path) -> None:
    """A token with a long vector in the head, which one row alone is to predict."""
    rare, odd, base = 90, 13, tiny_llama()
    rows = [
        {"input_ids": row["input_ids"], "labels": [n if n != rare else -100 for n in row["labels"]]} for row in ROWS
    ]
    clean = LoraDAConfig(samples=30, first_step="none")
    for at_fault in (False, True):
        model = copy.deepcopy(base)
        with torch.no_grad():
            model.lm_head.weight[rare] *= 2
        if at_fault:
            rows[odd]["labels"] = [label if label == -100 else rare for label in rows[odd]["labels"]]
        report = initialize_lora_da_weights(with_lora(model), loader(rows), clean, show_progress=False)
        assert report.data is not None and report.data.rows_by("gradient") == ([odd] if at_fault else [])
    assert report.line().splitlines()[-1] == (
        f"LoRA-DA: of 30 rows that were read, 1 has a gradient that stands out (row {odd})"
    )


def test_rows_that_hold_several_documents_have_no_gradients() -> None:
    report = initialised([packed(ROWS)], population_size=40)
    assert report.gradient_norms == [] and report.data is not None and report.data.rows_by("gradient") == []
    assert report.data.unknown["gradient"] == "0 rows whose gradients are known are too few to tell a usual one by"


def test_a_start_from_the_cache_has_them_too(tmp_path: Path) -> None:
    """And rows that come at other places are another start, as the report names them by these."""
    first, again = (initialised(loader(planted()), cache_dir=str(tmp_path)) for _ in range(2))
    assert again.from_cache and again.gradient_norms == first.gradient_norms != []
    moved = [{**ROWS[0], "labels": [-100] * len(ROWS[0]["labels"])}, *planted()]
    other = initialised(loader(moved), cache_dir=str(tmp_path))
    assert not other.from_cache
    assert [row for row, _ in other.gradient_norms] == [row + 1 for row, _ in first.gradient_norms]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-6), (torch.bfloat16, 0.05)])
def test_gradients_of_other_dtypes(dtype: torch.dtype, rounding: float) -> None:
    """Within float32, in which they are told, and within what bf16 activations leave of the gradient itself."""
    base = tiny_llama().to(dtype)
    report = initialised(loader(planted()), with_lora(copy.deepcopy(base)))
    assert len(report.gradient_norms) == SAMPLES and report.initialized == report.targeted
    for row, norm in report.gradient_norms:
        assert norm == pytest.approx(own_gradient(base, planted()[row]), rel=rounding)
