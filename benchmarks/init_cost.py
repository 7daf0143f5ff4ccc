"""What an initialisation costs beside the pass it cannot do without, the published procedure and its neighbours.

    python -m benchmarks.init_cost --model smollm2
    python -m benchmarks.init_cost --model llama-2-7b --segments 2 4 8 16 32

All entries run in one process on the same model, samples and device, repeats interleaved. Every measurement is written
to JSON as soon as it is there; the table (Markdown) and the chart (PNG) beside it are made from that file.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.command import cost_parser, run
from benchmarks.entries import EVA, LORA_GA, ONE_PASS, PUBLISHED, Entry, Prepared, all_entries, streamed
from benchmarks.errors import BenchmarkError
from benchmarks.measure import environment, release_memory
from benchmarks.published import profile
from benchmarks.report import write_report
from benchmarks.subjects import SUBJECTS


def main() -> None:
    arguments = _parse()
    disable_progress_bar()
    device = torch.device(arguments.device)
    subject = SUBJECTS[arguments.model].resized(arguments.samples, arguments.length, arguments.batch_size)
    judged = arguments.judge or (streamed(max(arguments.segments)) if device.type == "cuda" else ONE_PASS)
    entries = all_entries(subject, device, arguments.segments, judged)
    asked = [entry for entry in entries if entry.name.startswith(tuple(arguments.only))]
    if not asked:
        names = ", ".join(dict.fromkeys(repr(entry.name) for entry in entries))
        raise BenchmarkError(f"--only is {' '.join(arguments.only)}; no entry begins so, there are {names}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"init_cost_{subject.name}_{device.type}.json"
    result: dict[str, Any] = {
        **environment(device),
        "model": subject.name,
        "device": device.type,
        "judged": judged,
        "length": subject.length,
        "repeats": arguments.repeats,
        "measurements": [],
    }
    for repeat in range(arguments.repeats):
        for base in dict.fromkeys(entry.base for entry in asked):
            due = [entry for entry in asked if entry.base == base and repeat < _repeats(entry, arguments)]
            if not due:
                continue
            prepared = Prepared(subject, base, device)
            result["data"] = prepared.data()
            if base == "bf16" and arguments.profile and repeat == 0:
                profile(prepared.peft_model, prepared.rows, device, path.with_suffix(".published_profile.txt"))
            for measurement in _measure(due, prepared):
                result["measurements"].append({"repeat": repeat, **measurement})
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            del prepared
            release_memory()
    print(write_report(path))
    failed = [f"{m['row']} on {m['base']}" for m in result["measurements"] if "error" in m]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _measure(entries: list[Entry], prepared: Prepared) -> Iterator[dict[str, Any]]:
    for entry in entries:
        measurement: dict[str, Any] = {"row": entry.name, "base": entry.base}
        try:
            details, cost = entry.run(prepared)
        except Exception as error:  # the other entries are still worth having
            traceback.print_exc()
            measurement["error"] = f"{type(error).__name__}: {error}"
            print(f"{entry.name} on {entry.base}: {measurement['error']}", file=sys.stderr, flush=True)
        else:
            measurement |= {"cost": asdict(cost), "details": details}
            print(f"{entry.name} on {entry.base}: {cost.seconds:.2f} s", file=sys.stderr, flush=True)
        yield measurement


def _repeats(entry: Entry, arguments: argparse.Namespace) -> int:
    own = {
        PUBLISHED: arguments.published_repeats,
        EVA: arguments.neighbour_repeats,
        LORA_GA: arguments.neighbour_repeats,
    }
    repeats = own.get(entry.name)
    return arguments.repeats if repeats is None else min(repeats, arguments.repeats)


def _parse() -> argparse.Namespace:
    parser = cost_parser(__doc__)
    parser.add_argument("--model", choices=SUBJECTS, default="smollm2")
    parser.add_argument("--samples", type=int, help="default: 64 for smollm2, 256 for the large ones")
    parser.add_argument("--length", type=int, help="tokens in a row, of real text at most; default: 256 or 512")
    parser.add_argument("--batch-size", type=int, help="rows in a batch of the loader; default: 8")
    parser.add_argument("--segments", type=int, nargs="+", default=[2, 4, 8], help="streamed entries of ours")
    parser.add_argument(
        "--judge", help="the entry the targets are judged on; default: one pass on a CPU, else streamed"
    )
    parser.add_argument("--published-repeats", type=int, default=1)
    parser.add_argument("--neighbour-repeats", type=int, help="of EVA and LoRA-GA; default: as --repeats")
    parser.add_argument("--only", nargs="+", default=[""], help="only entries whose names begin so")
    parser.add_argument("--profile", action="store_true", help="also write where the published procedure's time goes")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
