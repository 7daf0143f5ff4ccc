"""`python -m lora_da --check`: planted faults in a file are counted exactly, and no adapter is written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from models import WIDE, tiny_llama
from words import LETTERS, as_lines, tokenizer

from lora_da.__main__ import main

FILES = {"lora_da_check.json", "lora_da_check.png"}


def rows(count: int = 80) -> list[dict[str, str]]:
    """Prompts and answers of letters, none of them twice."""
    chance, found = random.Random(0), set()
    while len(found) < count:
        found.add(tuple(" ".join(chance.choices(LETTERS, k=chance.randint(3, 9))) for _ in range(2)))
    return [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in sorted(found)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(**WIDE).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def checked(model: Path, folder: Path, written: Any, *more: str) -> int:
    as_lines(folder / "rows.jsonl", written)
    options = ["--check", "--model", str(model), "--data", str(folder / "rows.jsonl"), "--device", "cpu"]
    return main([*options, *more])


def found(folder: Path) -> dict[str, list[int]]:
    report = json.loads((folder / "lora_da_check.json").read_text(encoding="utf-8"))
    by: dict[str, list[int]] = {}
    for finding in report["findings"]:
        by.setdefault(finding["reason"], []).append(finding["row"])
    return by


def test_planted_rows(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written = rows()
    written[11] = written[33] = written[5]
    long = " ".join(LETTERS * 3)
    written[40] = {"prompt": "a b c", "completion": f" {long}"}
    written[41] = {"prompt": long + " " + long[:-2], "completion": " a"}
    assert checked(model, tmp_path, written, "--max-length", "20") == 0
    assert found(tmp_path) == {"duplicate": [11, 33], "cut": [40], "masked": [41]}
    shown = json.loads((tmp_path / "lora_da_check.json").read_text(encoding="utf-8"))["findings"][1]
    assert (shown["row"], shown["figures"]) == (11, {"of": 5})
    assert shown["text"].split() == [*written[5]["prompt"].split(), *written[5]["completion"].split(), "<eos>"]
    out, err = capsys.readouterr()
    assert out.startswith("LoRA-DA: 80 rows of ") and "80 rows; loading" in err
    assert "1 is cut off before its answer ends (row 40)\n" in out and "rows and figures: lora_da_check.json\n" in out
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "rows.jsonl"}


def test_clean_rows(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(model, tmp_path, rows(), "--output", str(tmp_path / "out")) == 0
    assert found(tmp_path / "out") == {} and "nothing was found in them" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_bad_row_is_one_sentence(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written: list[Any] = rows()
    written[7] = {"prompt": "a b", "completion": 3}
    assert checked(model, tmp_path, written, "--output", str(tmp_path / "out")) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert "lora_da: row 7 cannot be read by `prompt` and `completion`: " in err
    assert not (tmp_path / "out").exists()


def test_without_a_check_the_output_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--model", "m", "--data", "d.jsonl"])
    assert left.value.code == 2 and "the following arguments are required: --output" in capsys.readouterr().err
