"""A sweep: every cell that one YAML file asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.errors import BenchmarkError
from benchmarks.quality.corpora import SPLITS, Corpus
from benchmarks.quality.results import Cell
from benchmarks.quality.starts import digest
from lora_da.errors import LoraDAError


@dataclass(frozen=True)
class Start:
    """How adapters start.

    Args:
        name: as reports call it.
        method: `plain`; a `method:` of LoRA-DA's; `eva`; or what starts on the unquantised model.
        settings: of `LoraDAConfig`, its preset possibly with changes to it, `control` and `candidate`; see `starts`.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Tasks × starts × rates × seeds, and what is the same in all of them.

    Args:
        corpora: by the name of their task.
        judged: names of the starts that are held against the goals. controls: those with a `control`.
    """

    corpora: Mapping[str, Corpus]
    cells: Sequence[Cell]
    judged: Sequence[str]
    controls: Sequence[str]


ONE_OF_EACH = ("split", "steps", "batch", "length", "heldout_rows", "curve_rows", "model", "base")


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's YAML. A start may have `rates`, `ranks`, `seeds` and `init_samples` of its own.

    Raises:
        BenchmarkError: there is no such file, it has a key that nothing reads, lacks one, or sets what nobody knows.
    """
    if not path.exists():
        raise BenchmarkError(f"there is no sweep {path}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = {*ONE_OF_EACH, "tasks", "starts", "judged", "rates", "ranks", "seeds", "init_samples"}
    if set(content) != expected:
        raise BenchmarkError(
            f"{path}: has {sorted(set(content) - expected)} too many, lacks {sorted(expected - set(content))}"
        )
    if content["split"] not in SPLITS:
        raise BenchmarkError(f"{path}: split is {content['split']!r}; set one of {', '.join(SPLITS)}")
    with _told_as_of(path):
        corpora = {
            name: Corpus(name, **{**fields, "choices": tuple(fields.get("choices", ()))})
            for name, fields in content["tasks"].items()
        }
        cells = list(_cells(content, corpora))
    controls = [name for name, start in content["starts"].items() if "control" in (start.get("settings") or {})]
    return Sweep(corpora, cells, content["judged"], controls)


@contextlib.contextmanager
def _told_as_of(path: Path) -> Iterator[None]:
    """Name the sweep that a field or a setting is of which nobody knows."""
    try:
        yield
    except KeyError as error:
        raise BenchmarkError(f"{path}: there is no {error}") from error
    except (TypeError, LoraDAError) as error:
        raise BenchmarkError(f"{path}: {error}") from error


def _cells(content: Mapping[str, Any], corpora: Mapping[str, Corpus]) -> Iterator[Cell]:
    """Go seed by seed, so that a sweep that is cut short has whole seeds, and rate by rate over the starts."""
    common = {name: content[name] for name in ONE_OF_EACH}
    starts = {name: dict(fields or {}) for name, fields in content["starts"].items()}
    grids = {
        name: {axis: fields.pop(axis, content[axis]) for axis in ("rates", "ranks", "seeds", "init_samples")}
        for name, fields in starts.items()
    }
    built = [Start(name, **fields) for name, fields in starts.items()]
    numbers = {start.name: digest(start.method, start.settings) for start in built}
    data = {name: corpus.digest() for name, corpus in corpora.items()}

    def union(axis: str) -> list[Any]:
        return sorted({value for grid in grids.values() for value in _listed(grid[axis])})

    for seed, task, rank, samples, rate, start in product(
        union("seeds"), corpora, union("ranks"), union("init_samples"), union("rates"), built
    ):
        asked = {"seeds": seed, "ranks": rank, "init_samples": samples, "rates": rate}
        if all(value in _listed(grids[start.name][axis]) for axis, value in asked.items()):
            yield Cell(
                task=task,
                data=data[task],
                start=start.name,
                method=start.method,
                settings=start.settings,
                numbers=numbers[start.name],
                rank=rank,
                rate=rate,
                seed=seed,
                init_samples=samples,
                **common,
            )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
