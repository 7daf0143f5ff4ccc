"""What there is to find out on a GPU, one stage a call.

    python -m benchmarks.gpu block --output outputs/gpu

Each part is written to the stage's JSON as it ends, and a second call goes on where the first was stopped: parts that
have their figures are not run again. Where the device is a CPU, everything is of toy size.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.command import run
from benchmarks.gpu import chart
from benchmarks.gpu.parts import NotRun, Part, Place, Record, in_words, run_parts

MINUTES = 7.0  # after which no part is begun: the longest takes two
CAPS, LENGTHS = (12, 16, 24), (300, 2048)

# In the order in which they are run: the module that has the parts, and what it is told.
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "tests": ("pytests", {}),
    "block": ("block", {}),
    "solve": ("solve", {}),
    "products": ("products", {}),
    **{f"whole-{cap}-{length}": ("whole", {"cap": cap, "length": length}) for cap in CAPS for length in LENGTHS},
    "trl": ("trainer", {}),
    "quality": ("quality", {}),
}


def main() -> None:
    arguments = _parse()
    disable_progress_bar()
    if arguments.list:
        print("\n".join(STAGES))
        return
    device = torch.device(arguments.device)
    place = Place(device, arguments.toy or device.type == "cpu", arguments.output.absolute())
    place.output.mkdir(parents=True, exist_ok=True)
    stage = arguments.stage
    print(f"{stage} on {place.name()}", flush=True)
    record = Record(place.file(stage), stage, place)
    parts = stage_parts(stage, place, arguments.sweeps)
    left = run_parts(parts, record, place, arguments.minutes)
    _chart(record)
    if left:
        print(f"left for another call: {', '.join(left)}")
    failed = record.failed(parts)
    if failed:
        sys.exit(f"{stage} failed: {', '.join(failed)}")


def stage_parts(stage: str, place: Place, sweeps: list[Path]) -> list[Part]:
    """The stage's parts; where a package is absent that its module needs, one that says so."""
    module, settings = STAGES[stage]
    if stage == "quality":
        settings = {"sweeps": sweeps}
    try:
        return import_module(f"benchmarks.gpu.{module}").parts(place, **settings)
    except ModuleNotFoundError as error:
        return [Part(stage, _absent(error))]


def _absent(error: ModuleNotFoundError) -> Any:
    def run() -> None:
        raise error

    return run


def _chart(record: Record) -> None:
    try:
        chart.draw(record.content, record.path.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"no chart: {in_words({'not_run': str(NotRun(f'no {error.name}'))})}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES, nargs="?", help="see --list")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="toy size on a GPU too")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no further part is begun")
    parser.add_argument("--sweeps", type=Path, nargs="+", default=[], help="of `quality`, in their order")
    parser.add_argument("--list", action="store_true", help="name the stages in their order, and end")
    arguments = parser.parse_args()
    if arguments.stage is None and not arguments.list:
        parser.error("name a stage, or --list")
    return arguments


if __name__ == "__main__":
    run(main)
