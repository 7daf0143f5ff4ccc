"""The files that benchmarks read are found, or named."""

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.tokenized_rows import data_file

pytestmark = pytest.mark.once


def test_a_file_is_found_in_the_folder_or_where_its_path_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DA_DATA", str(tmp_path))
    file = tmp_path / "rows.jsonl"
    file.touch()
    assert data_file("rows.jsonl") == data_file(str(file)) == file


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DA_DATA", str(tmp_path))
    with pytest.raises(BenchmarkError, match=r"no .*rows\.jsonl; set LORA_DA_DATA to a folder with rows\.jsonl"):
        data_file("rows.jsonl")
