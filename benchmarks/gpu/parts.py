"""A stage is a list of parts, each a function of figures; what is done already is not done again."""

from __future__ import annotations

import importlib.util
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.measure import environment, release_memory

Figures: TypeAlias = dict[str, Any]

OURS = ("axolotl_lora_da", "benchmarks", "examples", "lora_da", "trl_integration")
CUT_OFF = "it was begun and did not end: what ran it was stopped, by a time limit or a crash"
# Under this key figures may say what they should have been and are not.
MISSED = "missed"


class NotRun(Exception):
    """A part has nothing to run on; the message says what is absent: `no flash_attn`."""


@dataclass(frozen=True)
class Place:
    """Where a stage runs, and where its files go.

    Args:
        device: of the models.
        toy: whether everything is as small as it can be.
        output: a folder; what an earlier call has left in it is read.
    """

    device: torch.device
    toy: bool
    output: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def name(self) -> str:
        """The device, as figures are kept apart by."""
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"
        return f"{name}, toy" if self.toy else name

    def file(self, stage: str) -> Path:
        return self.output / f"gpu_{stage}{'_toy' if self.toy else ''}_{self.device.type}.json"


@dataclass(frozen=True)
class Part:
    """What is run and looked at by itself, and its name within the stage."""

    name: str
    run: Callable[[], Figures]


def need(*packages: str) -> None:
    """Look for packages before anything is done.

    Raises:
        NotRun: one is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise NotRun(f"no {package}")


class Record:
    """The JSON of a stage, written whenever something is known.

    Args:
        path: of the file.
        place: the figures in it are of.

    Raises:
        BenchmarkError: the file has figures of another device.
    """

    def __init__(self, path: Path, stage: str, place: Place) -> None:
        self.path = path
        self.content: dict[str, Any] = {"stage": stage, "device": place.name(), "calls": [], "begun": None, "parts": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        if self.content["device"] != place.name():
            raise BenchmarkError(
                f"{path} has figures of {self.content['device']}, this is {place.name()}; set another folder (--output)"
            )
        if self.content["begun"] is not None:
            self.end({"error": CUT_OFF})
        self.content["calls"].append(environment(place.device))
        self.save()

    @property
    def parts(self) -> dict[str, Any]:
        """What came of each part that was begun, by its name."""
        return self.content["parts"]

    def is_done(self, part: Part) -> bool:
        """Whether it has figures, and all are as they should be."""
        figures = self.parts.get(part.name, {}).get("figures")
        return figures is not None and MISSED not in figures

    def begin(self, part: Part) -> None:
        self.content["begun"] = part.name
        self.save()

    def end(self, outcome: dict[str, Any]) -> None:
        """Note what came of the part that was begun."""
        self.parts[self.content["begun"]] = {"call": len(self.content["calls"]) - 1, **outcome}
        self.content["begun"] = None
        self.save()

    def failed(self, parts: Sequence[Part]) -> list[str]:
        """The names of those that ended in an error, or whose figures are not as they should be."""
        there = {part.name: self.parts.get(part.name, {}) for part in parts}
        return [name for name, found in there.items() if "error" in found or MISSED in found.get("figures", {})]

    def save(self) -> None:
        """Write the file, which is whole at any time."""
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)


def run_parts(parts: Sequence[Part], record: Record, place: Place, minutes: float) -> list[str]:
    """Run what is not done, first what was never begun; the names of those that are left for another call.

    Args:
        minutes: after which no further part is begun.
    """
    due = [part for part in parts if not record.is_done(part)]
    due.sort(key=lambda part: part.name in record.parts)
    until = time.monotonic() + 60 * minutes
    for number, part in enumerate(due):
        if time.monotonic() > until or (number and not is_alive(place.device)):
            return [left.name for left in due[number:]]
        record.begin(part)
        began = time.perf_counter()
        outcome = outcome_of(part)
        record.end({**outcome, "wall_seconds": round(time.perf_counter() - began, 2)})
        print(f"{part.name}: {in_words(outcome)}", flush=True)
        release_memory()
    return []


def outcome_of(part: Part) -> dict[str, Any]:
    """Its figures, what is absent, or the error that it ended in."""
    try:
        return {"figures": part.run()}
    except NotRun as absent:
        return {"not_run": str(absent)}
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OURS:
            return {"not_run": f"no {error.name}"}
        traceback.print_exc()
        return {"error": str(error)}
    except Exception as error:  # the other parts are still worth having
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def is_alive(device: torch.device) -> bool:
    """Whether the device still works: after some errors it does not, for as long as the process runs."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        print(f"the device is lost, the rest wants another call: {error}", flush=True)
        return False
    return True


def in_words(outcome: dict[str, Any]) -> str:
    """One line of what came of a part."""
    if "not_run" in outcome:
        return f"not run: {outcome['not_run']}"
    if "error" in outcome:
        return f"failed: {outcome['error'].strip().splitlines()[-1]}"
    return ", ".join(_figure(name, value) for name, value in outcome["figures"].items() if not _is_long(value))


def _figure(name: str, value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{name.replace('_', ' ')} {shown}"


def _is_long(value: Any) -> bool:
    return isinstance(value, (list, dict))
