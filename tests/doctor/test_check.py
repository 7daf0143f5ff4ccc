"""A whole check on a tiny model: text, JSON and picture say the same, and bad rows are one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import classifier
from models import documents, few_tokens, tiny_llama
from picture import differences, picture

from lora_da import LoraDAError
from lora_da.doctor.check import CHECK_FILE, PICTURE_FILE, check, check_and_save
from lora_da.findings import DataReport

ROWS = few_tokens(documents(60, shortest=6, longest=20))
LONGEST = 20
MASKED, REPEATED = (4, 44), {31: 2, 59: 2}


def planted() -> list[dict[str, list[int]]]:
    rows = [dict(row) for row in ROWS]
    for row in MASKED:
        rows[row]["labels"] = [-100] * len(rows[row]["input_ids"])
    for row, of in REPEATED.items():
        rows[row] = rows[of]
    return rows


def checked(rows: Any, model: Any = None) -> DataReport:
    return check(model or tiny_llama(), rows, max_length=LONGEST + 1, show_progress=False)


def test_planted_rows_are_counted_exactly() -> None:
    found = checked(planted())
    assert found.rows_by("masked") == list(MASKED)
    assert {f.row: f.figures["of"] for f in found.findings if f.reason == "duplicate"} == REPEATED
    left_out = {*MASKED, *REPEATED}
    assert [row.row for row in found.losses] == [n for n in range(len(ROWS)) if n not in left_out]
    assert checked(ROWS).findings == []


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    before = picture(model)
    checked(planted(), model)
    assert differences(before, picture(model)) == []


def saved(folder: Path, rows: Any) -> tuple[list[str], dict[str, Any]]:
    text = check_and_save(lambda: checked(rows), folder, torch.device("cpu"))
    return text, json.loads((folder / CHECK_FILE).read_text(encoding="utf-8"))


def test_text_json_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    text, found = saved(tmp_path / "new", planted())
    tokens, loss_tokens = found["tokens"], found["loss_tokens"]
    assert text[0] == f"LoRA-DA: 60 rows of {tokens:,} tokens, of which {loss_tokens / tokens:.1%} carry loss"
    assert text[1] == f"mean loss {found['loss']:.3f} per loss token"
    assert "2 have no token that carries loss (rows 4, 44)" in text
    assert "2 repeat earlier ones (rows 31, 59)" in text
    assert text[-1] == f"picture: {tmp_path / 'new' / PICTURE_FILE}"
    assert (tmp_path / "new" / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
    assert {"row": 59, "reason": "duplicate", "figures": {"of": 2}, "text": ""} in found["findings"]
    assert len(found["losses"]) == 56 and all(len(row) == 4 for row in found["losses"])
    assert sum(n * mean for _, n, mean, _ in found["losses"]) == pytest.approx(
        found["loss"] * sum(n for _, n, _, _ in found["losses"])
    )
    assert found["memory_of"] == "process" and found["peak_memory_gib"] > 0


def test_clean_rows_in_words(tmp_path: Path) -> None:
    assert saved(tmp_path, ROWS)[0][2] == "nothing was found in them"


def test_without_matplotlib_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert saved(tmp_path, ROWS)[0][-1] == "picture: not drawn: no matplotlib"
    assert not (tmp_path / PICTURE_FILE).exists()


def test_rows_of_which_none_trains_anything(tmp_path: Path) -> None:
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS]
    text, found = saved(tmp_path, rows)
    assert "60 have no token that carries loss (rows 0, 1, 2, 3, 4, …)" in text and found["loss"] is None
    assert text[-1] == "picture: not drawn: no losses"


SLIPS: dict[str, tuple[Any, str]] = {
    "no labels": ({"input_ids": [3]}, r"row 1 has no `labels` \(keys seen: input_ids\)"),
    "no ids": ({"labels": [3]}, r"row 1 has no `input_ids` \(keys seen: labels\)"),
    "lengths": ({"input_ids": [3, 4], "labels": [3]}, r"row 1 has 2 `input_ids` and 1 `labels`"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_bad_row_is_named(slip: str) -> None:
    row, message = SLIPS[slip]
    with pytest.raises(LoraDAError, match=message):
        checked([ROWS[0], row])


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(LoraDAError, match="is no causal language model, which the rows are checked with"):
        checked(ROWS, classifier("Llama"))


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraDAError, match="the output folder .*file is a file; choose another one"):
        saved(tmp_path / "file", ROWS)
