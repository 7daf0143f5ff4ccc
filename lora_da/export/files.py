"""The rows of a user's file, as they lie in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_da.errors import LoraDAError


def load_rows(path: Path) -> Sequence[Mapping[str, Any]]:
    """The rows of a .json, .jsonl or .parquet file, or of a folder written by `datasets` (`save_to_disk`).

    Raises:
        LoraDAError: there is no such file, it is of another kind or cannot be read.
    """
    if path.is_dir():
        return _saved_dataset(path)
    if not path.exists():
        raise LoraDAError(f"there is no file or folder {path}")
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise LoraDAError(f"{path} is none of .json, .jsonl, .parquet and a folder written by `datasets`")
    return _Table(path) if path.suffix == ".parquet" else _json(path)


def _json(path: Path) -> list[Any]:
    """A list, or a row in each line, whatever the file is called."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            rows: list[Any] = json.loads(text)
            return rows
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # other line ends may be in strings
    except (OSError, ValueError) as error:
        raise LoraDAError(f"{path} cannot be read as JSON, neither a list nor a row in each line: {error}") from error


class _Table(Sequence[Mapping[str, Any]]):
    """The rows of a parquet file, made when they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import ArrowInvalid
            from pyarrow.parquet import read_table
        except ImportError as error:
            raise LoraDAError(f"to read {path} run: pip install pyarrow") from error
        try:
            self._table = read_table(path)
        except (OSError, ArrowInvalid) as error:
            raise LoraDAError(f"{path} cannot be read as parquet: {error}") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: Any) -> Any:
        (row,) = self._table.slice(number, 1).to_pylist()
        return row


def _saved_dataset(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise LoraDAError(f"to read the folder {path} run: pip install datasets") from error
    try:
        rows = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise LoraDAError(f"the folder {path} was not written by `datasets` (`save_to_disk`): {error}") from error
    if isinstance(rows, DatasetDict):
        if "train" not in rows:
            raise LoraDAError(f"{path} holds {', '.join(rows)} and no `train`; give the folder of one of them")
        rows = rows["train"]
    return rows
