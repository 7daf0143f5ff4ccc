"""What the commands share: the options of a cost, and an end in one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.errors import BenchmarkError

RESULTS = Path(__file__).parent / "results"


def run(main: Callable[[], None]) -> None:
    """Run a command, and end it with the sentence of a `BenchmarkError`, not with a traceback."""
    try:
        main()
    except BenchmarkError as error:
        sys.exit(f"error: {error}")


def cost_parser(description: str | None) -> argparse.ArgumentParser:
    """Parse what every measurement of a cost takes: where it runs, how often, and where the figures go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    return parser
