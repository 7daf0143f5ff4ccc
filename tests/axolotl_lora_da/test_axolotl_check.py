"""`python -m axolotl_lora_da --check`: faults planted in the rows of a config are counted; nothing is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="Axolotl is not installed")

from axolotl_runs import Project, Run
from models import documents, few_tokens

from axolotl_lora_da.__main__ import main

pytestmark = [pytest.mark.axolotl, pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
END, LONGEST = 2, 18
ROWS = [
    {name: [*values, END] for name, values in row.items()}
    for row in few_tokens(documents(48, shortest=6, longest=LONGEST - 1))
]


def check(config: str) -> None:
    raise SystemExit(main(["--check", config]))


def checked(project: Project, name: str, rows: Any, **changes: Any) -> Run:
    return project.run(name, check, datasets=[project.rows(name, rows)], sequence_len=LONGEST, **changes)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def found(run: Run) -> dict[str, list[int]]:
    assert run.succeeded, run.text[-6000:]
    by: dict[str, list[int]] = {}
    for finding in json.loads((run.output / "lora_da_check.json").read_text())["findings"]:
        by.setdefault(finding["reason"], []).append(finding["row"])
    return by


@pytest.mark.parametrize("changes", [{}, {"sample_packing": True, "plugins": None, "lora_da": None}])
def test_planted_rows(project: Project, changes: dict[str, Any]) -> None:
    """What Axolotl cuts off is longer than its rows may be."""
    rows = [dict(row) for row in ROWS]
    rows[20] = rows[30] = rows[3]
    rows[40] = {name: [*values[:-1], *[9] * LONGEST, END] for name, values in rows[40].items()}
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in few_tokens(documents(2, seed=1))]
    name = "packed" if changes else "planted"
    run = checked(project, name, rows + masked, excess_length_strategy="truncate", **changes)
    assert found(run) == {"masked": [48, 49], "duplicate": [20, 30], "cut": [40]}
    assert "LoRA-DA: 50 rows of " in run.text and "2 repeat earlier ones (rows 20, 30)" in run.text
    assert {path.name for path in run.output.iterdir()} >= {"lora_da_check.json", "lora_da_check.png"}
    assert not [path for path in run.output.iterdir() if path.suffix == ".safetensors"]


def test_clean_rows(project: Project) -> None:
    """One that is too long is dropped by Axolotl, as it does unless it is told otherwise, and that is said too."""
    long = {name: [9] * LONGEST * 2 for name in ROWS[0]}
    run = checked(project, "clean", [*ROWS, long])
    assert found(run) == {} and "LoRA-DA: 48 rows of " in run.text and "nothing was found in them" in run.text
    assert "Axolotl, before that: Dropped 1 sequences outside valid range" in run.text


def test_what_is_not_looked_at(project: Project) -> None:
    run = checked(project, "rewards", ROWS, reward_model=True)
    assert not run.succeeded and "Traceback" not in run.text
    assert "lora_da: reward_model is set in " in run.text and ", so there are rows in pairs" in run.text


def test_a_config_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "nowhere.yml"]) == 1
    assert capsys.readouterr().err == "lora_da: there is no config nowhere.yml\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'transformers', 'axolotl', 'datasets'): sys.modules[name] = None\n"
        "sys.argv = ['axolotl_lora_da', '--help']\n"
        "runpy.run_module('axolotl_lora_da', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--check" in done.stdout, done.stderr
