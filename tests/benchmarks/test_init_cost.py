"""The benchmark of the cost runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_on_a_tiny_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.init_cost", "--model", "tiny", "--repeats", "1"]
    command += ["--segments", "2", "4", "--output", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    result = json.loads((tmp_path / "init_cost_tiny_cpu.json").read_text())
    assert [m["row"] for m in result["measurements"] if "error" in m] == []
    plans = {m["row"]: m["details"]["plan"] for m in result["measurements"] if "plan" in m["details"]}
    assert plans["ours, one pass"].startswith("one pass")
    assert plans["ours, streamed in 2"].startswith("streamed: 2 segments of 2 layers")
    assert plans["ours, streamed in 4"].startswith("streamed: 4 segments of 1 layer")
    names = {target["name"]: target["value"] for target in result["targets"]}
    assert names["time, published procedure ÷ ours, both on bf16"] > 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
