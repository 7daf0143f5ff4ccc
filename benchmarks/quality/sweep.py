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
from benchmarks.qlora import ALPHA_OVER_R
from benchmarks.quality.corpora import SPLITS, Corpus
from benchmarks.quality.results import ADAPTERS, Cell
from benchmarks.quality.starts import A_TIMES, UNCLIPPED, digest
from lora_da.errors import LoraDAError


@dataclass(frozen=True)
class Start:
    """How adapters start.

    Args:
        name: as reports call it.
        method: `plain`; a `method:` of LoRA-DA's; `eva`; or what starts on the unquantised model.
        settings: of `LoraDAConfig`, its preset possibly with changes to it, `control` and `candidate`; of both
            plain LoRA and these `A_times`, `frozen_A` and `unclipped`; see `starts`.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """How a user trains.

    Args:
        rate: one for all tasks, or by the task's name.
        alpha_over_r: the adapter's scaling.
    """

    rate: float | Mapping[str, float]
    alpha_over_r: float

    def rate_of(self, task: str) -> float:
        return self.rate[task] if isinstance(self.rate, Mapping) else self.rate


@dataclass(frozen=True)
class Sweep:
    """Tasks × starts × rates × seeds, and what is the same in all of them.

    Args:
        corpora: by the name of their task.
        judged: names of the starts that are held against the goals. controls: those that change one thing of another.
        prediction: whether each start is asked for its learning rate before it is trained.
    """

    corpora: Mapping[str, Corpus]
    cells: Sequence[Cell]
    judged: Sequence[str]
    controls: Sequence[str]
    prediction: bool


ONE_OF_EACH = ("split", "batch", "length", "heldout_rows", "curve_rows", "model", "base")
AXES = ("steps", "ranks", "seeds", "init_samples")
UNLESS_SAID = {"adapters": "bf16", "alpha_over_r": ALPHA_OVER_R, "full_at": [], "prediction": True}
CONTROLS = ("control", A_TIMES, UNCLIPPED)  # settings


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's YAML. A start may have `rates`, `steps`, `ranks`, `seeds` and `init_samples` of its own. In the
    place of `rates` and `alpha_over_r` there may be `profiles` by name, see `Profile`.

    Raises:
        BenchmarkError: there is no such file, it has a key that nothing reads, lacks one, or sets what nobody knows.
    """
    if not path.exists():
        raise BenchmarkError(f"there is no sweep {path}")
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    content = UNLESS_SAID | written
    expected = {*ONE_OF_EACH, *AXES, *UNLESS_SAID, "tasks", "starts", "judged"}
    expected.add("profiles" if "profiles" in written else "rates")
    if set(content) != expected:
        raise BenchmarkError(
            f"{path}: has {sorted(set(content) - expected)} too many, lacks {sorted(expected - set(content))}"
        )
    if "profiles" in written and "alpha_over_r" in written:
        raise BenchmarkError(f"{path}: alpha_over_r is a profile's where there are `profiles`")
    for key, known in (("split", SPLITS), ("adapters", ADAPTERS)):
        if content[key] not in known:
            raise BenchmarkError(f"{path}: {key} is {content[key]!r}; set one of {', '.join(known)}")
    with _told_as_of(path):
        corpora = {
            name: Corpus(name, **{**fields, "choices": tuple(fields.get("choices", ()))})
            for name, fields in content["tasks"].items()
        }
        cells = list(dict.fromkeys(_cells(content, corpora)))  # profiles may meet in one
    controls = [
        name
        for name, start in content["starts"].items()
        if any(setting in CONTROLS for setting in start.get("settings") or {})
    ]
    return Sweep(corpora, cells, content["judged"], controls, content["prediction"])


@contextlib.contextmanager
def _told_as_of(path: Path) -> Iterator[None]:
    """Name the sweep that a field or a setting is of which nobody knows."""
    try:
        yield
    except KeyError as error:
        raise BenchmarkError(f"{path}: there is no {error}") from error
    except (TypeError, LoraDAError, BenchmarkError) as error:
        raise BenchmarkError(f"{path}: {error}") from error


def _cells(content: Mapping[str, Any], corpora: Mapping[str, Corpus]) -> Iterator[Cell]:
    """Go seed by seed, so that a sweep that is cut short has whole seeds; in it profile by profile over the tasks, and
    over the starts, each with its longest run first."""
    common = {name: content[name] for name in (*ONE_OF_EACH, "adapters")} | {"full_at": tuple(content["full_at"])}
    starts = {name: dict(fields or {}) for name, fields in content["starts"].items()}
    grids = {name: {axis: _listed(fields.pop(axis, content[axis])) for axis in AXES} for name, fields in starts.items()}
    if "profiles" in content:
        profiles = [Profile(**fields) for fields in content["profiles"].values()]
        rates = {name: [profile.rate_of(task) for profile in profiles for task in corpora] for name in starts}
    else:
        rates = {name: _listed(fields.pop("rates", content["rates"])) for name, fields in starts.items()}
        profiles = [
            Profile(rate, content["alpha_over_r"]) for rate in dict.fromkeys(r for own in rates.values() for r in own)
        ]
    built = [Start(name, **fields) for name, fields in starts.items()]
    numbers = {start.name: digest(start.method, start.settings) for start in built}
    data = {name: corpus.digest() for name, corpus in corpora.items()}

    def union(axis: str) -> list[Any]:
        return sorted({value for grid in grids.values() for value in grid[axis]})

    for seed, rank, samples, profile, task, start, steps in product(
        *(union(axis) for axis in ("seeds", "ranks", "init_samples")), profiles, corpora, built, union("steps")[::-1]
    ):
        asked = {"seeds": seed, "ranks": rank, "init_samples": samples, "steps": steps}
        rate = profile.rate_of(task)
        if rate in rates[start.name] and all(value in grids[start.name][axis] for axis, value in asked.items()):
            yield Cell(
                task=task,
                data=data[task],
                start=start.name,
                method=start.method,
                settings=start.settings,
                numbers=numbers[start.name],
                rank=rank,
                rate=rate,
                alpha_over_r=profile.alpha_over_r,
                seed=seed,
                steps=steps,
                init_samples=samples,
                exact_match_rows=corpora[task].exact_match_rows,
                **common,
            )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
