"""Results of the quality benchmark survive the disk, killed runs and several machines."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from quality_results import BASE_LOSS, cell, result

from benchmarks.errors import BenchmarkError
from benchmarks.quality.results import append, has_diverged, read

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[3]
NAN, INF = math.nan, math.inf


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "below" / "cells.jsonl"
    written = [
        result("eva", 1 / 3, 1, settings={"rho": 2.0}, accuracy={"heldout": 0.31, "majority": 0.27}, prediction=0.4),
        result(full_at=(0.5, 0.9), full=[(50, 1.2), (100, 1.0)], step_seconds=0.7, exact_match=0.05),
        result("default", seed=2, own_base=True, initialized=210),
    ]
    for one in written:
        append(path, one)
    found = read([path])
    assert found.results == tuple(written)
    assert found.notes == ()


def test_nan_and_infinity_come_back(tmp_path: Path) -> None:
    append(tmp_path / "cells", replace(result(final=NAN), train_loss=[INF, NAN]))
    (found,) = read([tmp_path / "cells"]).results
    assert math.isnan(found.final)
    assert found.train_loss[0] == INF
    assert math.isnan(found.train_loss[1])
    assert found.diverged


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_torn_line_is_named_and_the_next_run_writes_on(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cells.jsonl"
    for seed in range(2):
        append(path, result(seed=seed))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])  # killed while it wrote
    found = read([path])
    assert [one.cell.seed for one in found.results] == [0]
    assert len(found.notes) == 1
    assert "cells.jsonl, line 2" in found.notes[0]

    append(path, result(seed=2))
    found = read([path])
    assert [one.cell.seed for one in found.results] == [0, 2]
    assert len(found.notes) == 1


def test_a_whole_line_without_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    append(path, result())
    path.write_bytes(path.read_bytes()[:-1])
    append(path, result(seed=1))
    found = read([path])
    assert [one.cell.seed for one in found.results] == [0, 1]
    assert found.notes == ()


def test_machines_are_merged_and_the_first_of_a_cell_counts(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    append(one, result(final=0.9))
    append(one, result(seed=1))
    append(other, result(seed=2))
    append(other, result(final=0.8))  # finished there too
    found = read([one, other])
    assert [(run.cell.seed, run.final) for run in found.results] == [(0, 0.9), (1, 1.0), (2, 1.0)]
    assert len(found.notes) == 1
    assert "other.jsonl, line 2" in found.notes[0]
    assert "one.jsonl, line 1" in found.notes[0]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 200},
        {"heldout_rows": 64},
        {"length": 256},
        {"settings": {"damping": 0.2}},
        {"init_samples": 16},
        {"split": "test"},
        {"rate": 1.1e-3},
        {"base": "none"},
        {"adapters": "float32"},
        {"alpha_over_r": 0.5},
        {"full_at": (0.5,)},
        {"exact_match_rows": 100},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_must_be_equal_tells_cells_apart(tmp_path: Path, change: dict[str, object]) -> None:
    for one in (result(), replace(result(), cell=replace(cell(), **change))):
        append(tmp_path / "cells", one)
    found = read([tmp_path / "cells"])
    assert len(found.results) == 2
    assert found.notes == ()


def test_results_from_before_a_field_was_there_are_of_what_was_run_then(tmp_path: Path) -> None:
    append(tmp_path / "cells", result())
    fields = json.loads((tmp_path / "cells").read_text())
    for name in ("adapters", "alpha_over_r", "full_at", "exact_match_rows"):
        del fields["cell"][name]
    for name in ("full", "step_seconds", "exact_match"):
        del fields[name]
    (tmp_path / "cells").write_text(json.dumps(fields))
    (found,) = read([tmp_path / "cells"]).results
    assert found == result()
    assert (found.cell.adapters, found.cell.alpha_over_r) == ("bf16", 2.0)  # TRL's, and alpha twice the rank


def test_how_settings_are_written_does_not() -> None:
    one = cell(settings={"gamma": 1024, "damping": 0.1})
    assert {one} == {cell(settings={"damping": 0.1, "gamma": 1024.0})}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"cell": {"task": "gsm8k"}}', "split"),
        ("[]", "list indices"),
        ("{}", "cell"),
    ],
)
def test_json_that_is_no_result_is_refused_by_name(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "cells.jsonl"
    append(path, result())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BenchmarkError, match=rf"cells\.jsonl, line 2.*{told}"):
        read([path])


def test_processes_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    code = (
        "import sys; from pathlib import Path; from quality_results import result;"
        "from benchmarks.quality.results import append;"
        "[append(Path(sys.argv[1]), result(rate=float(sys.argv[2]), seed=seed)) for seed in range(50)]"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/support"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(rate)], env=environment) for rate in (1, 2)
    ]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    found = read([path])
    assert found.notes == ()
    assert {(one.cell.rate, one.cell.seed) for one in found.results} == {(r, s) for r in (1, 2) for s in range(50)}


@pytest.mark.parametrize(
    ("train", "heldout", "diverged"),
    [
        ([1.4, 1.0], [(0, 1.5), (2, 1.2)], False),
        ([1.4, 1.0], [(0, 1.7), (2, 1.2)], False),  # a bad start that recovers
        ([1.4, 1.0], [(0, 1.5), (2, BASE_LOSS)], False),
        ([1.4, 1.0], [(0, 1.5), (2, 1.51)], True),
        ([1.4, NAN], [(0, 1.5), (2, 1.2)], True),
        ([1.4, 1.0], [(0, 1.5), (1, INF), (2, 1.2)], True),
        ([1.4, 1.0], [(0, 1.5), (2, NAN)], True),
    ],
)
def test_divergence(train: list[float], heldout: list[tuple[int, float]], diverged: bool) -> None:
    assert has_diverged(train, heldout, heldout[-1][1], BASE_LOSS) is diverged
