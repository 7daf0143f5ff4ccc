"""What an initialisation costs beside the pass it cannot do without, the published procedure and its neighbours.

    python -m benchmarks.init_cost --model smollm2
    python -m benchmarks.init_cost --model llama-2-7b --segments 2 4 8 16 32

All rows run in one process on the same model, samples and device, repeats interleaved. Every measurement is written to
JSON as soon as it is there; the table (Markdown) and the chart (PNG) beside it are made from that file.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import conditions, release_memory
from benchmarks.published import profile
from benchmarks.qlora import BASES
from benchmarks.report import write_report
from benchmarks.rows import EVA, LORA_GA, ONE_PASS, PUBLISHED, Prepared, Row, all_rows, streamed
from benchmarks.subjects import SUBJECTS

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = _parse()
    disable_progress_bar()
    device = torch.device(arguments.device)
    subject = SUBJECTS[arguments.model].resized(arguments.samples, arguments.length, arguments.batch_size)
    judged = arguments.judge or (streamed(max(arguments.segments)) if device.type == "cuda" else ONE_PASS)
    rows = all_rows(subject, device, arguments.segments, judged)
    if arguments.rows:
        rows = [row for row in rows if any(row.name.startswith(name) for name in arguments.rows)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"init_cost_{subject.name}_{device.type}.json"
    result: dict[str, Any] = {
        **conditions(device),
        "model": subject.name,
        "device": device.type,
        "judged": judged,
        "length": subject.length,
        "repeats": arguments.repeats,
        "measurements": [],
    }
    for repeat in range(arguments.repeats):
        for base in BASES:
            due = [row for row in rows if row.base == base and repeat < _repeats(row, arguments)]
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


def _measure(rows: list[Row], prepared: Prepared) -> Iterator[dict[str, Any]]:
    for row in rows:
        entry: dict[str, Any] = {"row": row.name, "base": row.base}
        try:
            details, cost = row.run(prepared)
        except Exception as error:  # the other rows are still worth having
            traceback.print_exc()
            entry["error"] = f"{type(error).__name__}: {error}"
            print(f"{row.name} on {row.base}: {entry['error']}", file=sys.stderr, flush=True)
        else:
            entry |= {"cost": asdict(cost), "details": details}
            print(f"{row.name} on {row.base}: {cost.seconds:.2f} s", file=sys.stderr, flush=True)
        yield entry


def _repeats(row: Row, arguments: argparse.Namespace) -> int:
    own = {
        PUBLISHED: arguments.published_repeats,
        EVA: arguments.neighbour_repeats,
        LORA_GA: arguments.neighbour_repeats,
    }
    repeats = own.get(row.name)
    return arguments.repeats if repeats is None else min(repeats, arguments.repeats)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, default="smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, help="default: 64 for smollm2, 256 for the large ones")
    parser.add_argument("--length", type=int, help="tokens in a row, of real text at most; default: 256 or 512")
    parser.add_argument("--batch-size", type=int, help="rows in a batch of the loader; default: 8")
    parser.add_argument("--segments", type=int, nargs="+", default=[2, 4, 8], help="streamed rows of ours")
    parser.add_argument("--judge", help="the row the targets are judged on; default: one pass on a CPU, else streamed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--published-repeats", type=int, default=1)
    parser.add_argument("--neighbour-repeats", type=int, help="of EVA and LoRA-GA; default: as --repeats")
    parser.add_argument("--rows", nargs="+", help="only rows whose names start so")
    parser.add_argument("--profile", action="store_true", help="also write where the published procedure's time goes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
