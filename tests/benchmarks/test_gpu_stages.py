"""The stages for a GPU run at toy size on a CPU, go on where they stopped, and say what is absent or failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("matplotlib")

from benchmarks.errors import BenchmarkError
from benchmarks.gpu import chart
from benchmarks.gpu.__main__ import STAGES, stage_parts
from benchmarks.gpu.parts import CUT_OFF, MISSED, NotRun, Part, Place, Record, run_parts

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PLENTY = 60.0  # minutes


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(torch.device("cpu"), True, tmp_path)


def run(parts: list[Part], place: Place, minutes: float = PLENTY) -> tuple[Record, list[str]]:
    record = Record(place.file("block"), "block", place)
    return record, run_parts(parts, record, place, minutes)


def whole(place: Place, stage: str) -> dict[str, Any]:
    """What came of each part of a stage, as its JSON has it; nothing of it failed, and there is a chart."""
    parts = stage_parts(stage, place, [])
    record = Record(place.file(stage), stage, place)
    assert run_parts(parts, record, place, PLENTY) == [] and record.failed(parts) == []
    chart.draw(record.content, place.file(stage).with_suffix(".png"))
    assert place.file(stage).with_suffix(".png").exists()
    return json.loads(place.file(stage).read_text(encoding="utf-8"))["parts"]


@pytest.mark.parametrize("stage", ["block", "solve", "products", "whole-12-2048"])
def test_a_stage_has_its_figures(place: Place, stage: str) -> None:
    found = whole(place, stage)
    absent = {name for name, outcome in found.items() if "not_run" in outcome}
    assert absent == {name for name in found if name.startswith("flash")}
    assert all(outcome["figures"] for name, outcome in found.items() if name not in absent)


@pytest.mark.slow
def test_trainers_start_as_near_to_float32_as_they_do_on_a_cpu(place: Place) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    found = whole(place, "trl")
    near, packed = (found[name]["figures"] for name in ("plain", "packing"))
    assert near["documents"] == packed["documents"] and near["tokens"] == packed["tokens"]
    assert {name for name, outcome in found.items() if "not_run" in outcome} == {
        "offloading",
        "Liger",
        "Axolotl's kernels",
    }

    from benchmarks.gpu.trainer import TRUTH, Starts

    starts = Starts(place)
    true = starts.kept(TRUTH)
    assert MISSED not in starts.judged(true)
    assert MISSED in starts.judged({name: tensor.flip(1) for name, tensor in true.items()})


@pytest.mark.slow
def test_cells_of_a_sweep_are_trained_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.setenv("LORA_DA_DATA", "")  # put back afterwards: the stage names its own
    found = whole(place, "quality")
    lines = place.file("quality").with_suffix(".jsonl").read_text(encoding="utf-8")
    assert len(found) == len(lines.splitlines()) == 2
    place.file("quality").unlink()  # the lines alone are enough
    assert [outcome["figures"] for outcome in whole(place, "quality").values()] == [
        outcome["figures"] for outcome in found.values()
    ]
    assert place.file("quality").with_suffix(".jsonl").read_text(encoding="utf-8") == lines


@pytest.mark.slow
def test_the_tests_of_a_gpu_are_counted(place: Place) -> None:
    figures = whole(place, "tests")["tests"]["figures"]
    assert figures["passed_tests"] == 3 and figures["failed_tests"] == figures["skipped_tests"] == 0


@pytest.mark.slow
def test_the_script_runs_what_is_named_and_writes_to_its_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "benchmarks/gpu.sh", "products", "--minutes", "5"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "== products" in ended.stdout and "seconds" in ended.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_products_toy_cpu.json", "gpu_products_toy_cpu.png"}
    command[2] = "nonsense"
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and "failed: nonsense" in ended.stdout


def test_what_is_done_is_not_done_again(place: Place) -> None:
    ran: list[str] = []
    parts = [Part(name, lambda name=name: ran.append(name) or {"seconds": 1.0}) for name in "abc"]  # type: ignore
    _, left = run(parts[:2], place)
    assert left == [] and ran == ["a", "b"]
    record, _ = run(parts, place)
    assert ran == ["a", "b", "c"] and record.parts["c"]["call"] == 1
    assert len(record.content["calls"]) == 2


def test_parts_are_left_when_time_is_out(place: Place) -> None:
    parts = [Part(name, dict) for name in "ab"]
    record, left = run(parts, place, minutes=-1)
    assert left == ["a", "b"] and record.failed(parts) == []


def test_errors_misses_and_absences_are_told_apart_and_tried_again(place: Place) -> None:
    def fail() -> Any:
        raise ValueError("a bug")

    def absent() -> Any:
        raise NotRun("no flash_attn")

    def without_package() -> Any:
        import a_package_that_is_not_there

        return a_package_that_is_not_there

    def without_module_of_ours() -> Any:
        from benchmarks.gpu import not_there  # type: ignore[attr-defined]

        return not_there

    def of_ours() -> Any:
        import benchmarks.not_there  # type: ignore[import-not-found]

        return benchmarks

    parts = [
        Part("fails", fail),
        Part("absent", absent),
        Part("package", without_package),
        Part("bug", without_module_of_ours),
        Part("ours", of_ours),
        Part("missed", lambda: {MISSED: "too far"}),
        Part("works", lambda: {"seconds": 1.0}),
    ]
    record, _ = run(parts, place)
    assert record.parts["fails"]["error"] == "ValueError: a bug"
    assert record.parts["absent"]["not_run"] == "no flash_attn"
    assert record.parts["package"]["not_run"] == "no a_package_that_is_not_there"
    assert record.failed(parts) == ["fails", "bug", "ours", "missed"]
    parts[0] = Part("fails", lambda: {"seconds": 2.0})
    again, _ = run(parts, place)
    assert again.failed(parts) == ["bug", "ours", "missed"] and "call" in again.parts["works"]
    assert again.parts["works"]["call"] == 0 and again.parts["fails"]["call"] == 1


def test_a_part_that_was_cut_off_waits_for_the_others(place: Place) -> None:
    ran: list[str] = []
    parts = [Part(name, lambda name=name: ran.append(name) or {"seconds": 1.0}) for name in "ab"]  # type: ignore
    Record(place.file("block"), "block", place).begin(parts[0])
    record = Record(place.file("block"), "block", place)
    assert record.parts["a"]["error"] == CUT_OFF
    run_parts(parts, record, place, PLENTY)
    assert ran == ["b", "a"] and record.failed(parts) == []


def test_figures_of_two_devices_are_not_mixed(place: Place) -> None:
    run([Part("a", dict)], place)
    path = place.file("block")
    path.write_text(path.read_text(encoding="utf-8").replace("CPU, toy", "a GPU"), encoding="utf-8")
    with pytest.raises(BenchmarkError, match="has figures of a GPU, this is CPU, toy; set another folder"):
        run([Part("a", dict)], place)


def test_every_stage_is_a_module() -> None:
    assert [name for name in STAGES if not name.startswith("whole")] == [
        "tests",
        "block",
        "solve",
        "products",
        "trl",
        "quality",
    ]
    assert all((ROOT / "benchmarks" / "gpu" / f"{module}.py").exists() for module, _ in STAGES.values())
