"""Runs functions of the tests in several processes, started as users start theirs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SUPPORT = Path(__file__).parent
PATIENCE = 400  # seconds, for a machine that does other things too


@dataclass(frozen=True)
class Run:
    """A finished launch: `results` by rank, what each function returned, and what was printed."""

    results: list[Any]
    code: int
    output: str
    seconds: float


def launch(n: int, function: str, folder: Path, **environment: str) -> Run:
    """Run `module.function` of the tests in `n` processes of torchrun, on the CPU.

    Args:
        n: processes.
        function: its dotted name; it takes the folder and returns what torch can save.
        folder: for its files and its results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths, **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    started = time.monotonic()
    done = subprocess.run(
        [*command, str(SUPPORT / "processes.py"), function, str(folder)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    files = [folder / f"result{rank}.pt" for rank in range(n)]
    results = [torch.load(f, weights_only=False) if f.exists() else None for f in files]
    return Run(results, done.returncode, done.stdout, time.monotonic() - started)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    module, function = name.rsplit(".", 1)
    result = getattr(importlib.import_module(module), function)(folder)
    torch.save(result, folder / f"result{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
