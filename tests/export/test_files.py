"""A user's rows as files: of every kind that there is, and what is said where one cannot be read."""

from __future__ import annotations

import json
import sys

import pytest
from words import as_lines, tokenizer

from lora_da import LoraDAError
from lora_da.export.files import load_rows
from lora_da.export.rows import TokenizedRows

ASKED = {"role": "user", "content": "a b"}
ROWS = [
    {"messages": [ASKED, {"role": "assistant", "content": "c d"}], "id": 1},
    {"messages": [{"role": "system", "content": "g"}, ASKED, {"role": "assistant", "content": "d e"}], "id": 2},
]


def as_parquet(path, rows):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def as_dataset(path, rows, split=None):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    data = datasets.Dataset.from_list(rows)
    (data if split is None else datasets.DatasetDict({split: data})).save_to_disk(str(path))


FILES = {
    "rows.jsonl": as_lines,
    "lines.json": as_lines,
    "list.json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8"),
    "marked.json": lambda path, rows: path.write_text("\ufeff" + json.dumps(rows), encoding="utf-8"),
    "rows.parquet": as_parquet,
    "folder": as_dataset,
    "train": lambda path, rows: as_dataset(path, rows, "train"),
}


@pytest.mark.compat("command-files")
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path, name):
    FILES[name](tmp_path / name, ROWS)
    rows = load_rows(tmp_path / name)
    assert len(rows) == 2 and [rows[n]["id"] for n in (0, 1)] == [1, 2]
    read_here = [TokenizedRows(rows, tokenizer(), 100)[n] for n in (0, 1)]
    assert read_here == [TokenizedRows(ROWS, tokenizer(), 100)[n] for n in (0, 1)]


def test_a_line_of_a_file_ends_at_its_newline(tmp_path):
    """Not at what else ends lines in a text, which JSON need not escape."""
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(lines.encode())
    assert load_rows(tmp_path / "rows.jsonl") == rows


WRONG_FILES = {
    "missing.jsonl": (None, r"there is no file or folder .*missing\.jsonl"),
    "rows.csv": ("a,b\n", r"rows\.csv is none of \.json, \.jsonl, \.parquet and a folder"),
    "broken.jsonl": (
        '{"text": "a"}\n{"text": ',
        r"broken\.jsonl cannot be read as JSON, neither a list nor a row",
    ),
    "broken.json": ('[{"text": "a"}', r"broken\.json cannot be read as JSON"),
    "binary.json": (b"\xff\xfe\x00", r"binary\.json cannot be read as JSON"),
    "text.parquet": ("hello", r"text\.parquet cannot be read as parquet: "),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_cannot_be_read(tmp_path, name):
    content, message = WRONG_FILES[name]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LoraDAError, match=message):
        load_rows(tmp_path / name)


def test_folders_that_cannot_be_read(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoraDAError, match=r"the folder .*empty was not written by `datasets` \(`save_to_disk`\)"):
        load_rows(tmp_path / "empty")
    as_dataset(tmp_path / "splits", ROWS, "test")
    with pytest.raises(LoraDAError, match=r"splits holds test and no `train`; give the folder of one of them"):
        load_rows(tmp_path / "splits")


@pytest.mark.parametrize(("name", "package"), [("rows.parquet", "pyarrow"), ("folder", "datasets")])
def test_a_missing_package_is_named(tmp_path, name, package, monkeypatch):
    FILES[name](tmp_path / name, ROWS)
    monkeypatch.setitem(sys.modules, package, None)  # an import of it then fails
    with pytest.raises(LoraDAError, match=rf"{name} run: pip install {package}$"):
        load_rows(tmp_path / name)
