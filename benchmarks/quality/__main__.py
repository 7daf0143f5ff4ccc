"""python -m benchmarks.quality SWEEP.yml --results FILE.jsonl: run what of a sweep is not there yet, then report.

Several sweeps are run one after the other. A sweep that was stopped goes on where it was. `--processes 4` divides the
cells over processes of this machine; several machines take `--share 0/2` and `--share 1/2`, and a report reads all
their files (`--merge`).
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.command import run
from benchmarks.quality.made_with import environment_of
from benchmarks.quality.report import report
from benchmarks.quality.results import Finished, append, read
from benchmarks.quality.run import Runner
from benchmarks.quality.sweep import Sweep, read_sweep


def main() -> None:
    arguments = _parse()
    sweeps = {path.stem: read_sweep(path) for path in arguments.sweep}
    if arguments.processes > 1 and not arguments.report_only:
        _in_processes(arguments)
    elif not arguments.report_only:
        for sweep in sweeps.values():
            _run(sweep, arguments)
    if arguments.share is None:
        folder = arguments.report or arguments.results.parent
        cells = {name: sweep.cells for name, sweep in sweeps.items()}
        judged = dict.fromkeys(name for sweep in sweeps.values() for name in sweep.judged)
        controls = dict.fromkeys(name for sweep in sweeps.values() for name in sweep.controls)
        report(_finished(arguments), cells, folder, list(judged), list(controls))


def _finished(arguments: argparse.Namespace) -> Finished:
    return read([*arguments.merge, *([arguments.results] if arguments.results.exists() else [])])


def _run(sweep: Sweep, arguments: argparse.Namespace) -> None:
    """Train this process's share of the cells that no file has yet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number, of = arguments.share or (0, 1)
    finished = _finished(arguments)
    print("\n".join(finished.notes), end="\n" if finished.notes else "", file=sys.stderr)
    done = {result.cell for result in finished.results}
    cells = [cell for cell in itertools.islice(sweep.cells, number, None, of) if cell not in done]
    runners: dict[tuple[str, str], Runner] = {}
    for position, cell in enumerate(cells):
        if (cell.model, cell.base) not in runners:
            runners = {(cell.model, cell.base): Runner(cell.model, cell.base, device, arguments.cache)}
        runner, corpus = runners[cell.model, cell.base], sweep.corpora[cell.task]
        result = runner.run(cell, corpus, environment_of(device), sweep.prediction)
        append(arguments.results, result)
        print(
            f"{position + 1} of {len(cells)}: {cell.task} {cell.start} rank {cell.rank} alpha/r {cell.alpha_over_r:g} "
            f"rate {cell.rate:.2g} {cell.steps} steps seed {cell.seed}: "
            f"{result.base_loss:.4f} → {result.final:.4f} in {result.train_seconds:.0f} s",
            flush=True,
        )


def _in_processes(arguments: argparse.Namespace) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.quality",
        *map(str, arguments.sweep),
        "--results",
        str(arguments.results),
    ]
    command += itertools.chain.from_iterable(["--merge", str(file)] for file in arguments.merge)
    command += ["--cache", str(arguments.cache)] if arguments.cache else []
    (number, of), n = arguments.share or (0, 1), arguments.processes
    runs = [subprocess.Popen([*command, "--share", f"{number + of * k}/{of * n}"]) for k in range(n)]
    codes = [run.wait() for run in runs]
    if any(codes):
        sys.exit("a process failed; its message is above, and what was finished is kept")


def _share(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write 0/2 for the first half")
    return int(number), int(of)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the cells of a sweep that are not finished, then report.")
    parser.add_argument(
        "sweep", type=Path, nargs="+", help="YAML: tasks, starts, rates, seeds and what is the same in all cells"
    )
    parser.add_argument("--results", type=Path, required=True, help="JSONL, a line for each finished cell")
    parser.add_argument("--merge", type=Path, action="append", default=[], help="another machine's results")
    parser.add_argument("--report", type=Path, help="folder of the report; the results' own unless given")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--processes", type=int, default=1, help="that share this machine")
    parser.add_argument("--share", type=_share, help="K/N: every N-th cell from the K-th, without a report")
    parser.add_argument("--cache", type=Path, help="folder for solutions, so that the rates of a start share one")
    arguments = parser.parse_args()
    names = [path.stem for path in arguments.sweep]
    if len(set(names)) < len(names):
        parser.error(f"reports name a sweep by its file, and some are called the same: {', '.join(names)}")
    for file in arguments.merge:
        if not file.exists():
            parser.error(f"there is no {file} to merge")
    return arguments


if __name__ == "__main__":
    run(main)
