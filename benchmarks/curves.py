"""How time and memory of an initialisation grow with the depth of the model and with the number of samples.

    python -m benchmarks.curves
    python -m benchmarks.curves --device cuda --hidden 2048 --samples 64 --length 512

A 4-bit Llama of random weights and fixed width, streamed with one decoder layer in a segment unless told otherwise;
each point in a process of its own. Raw JSON and a PNG go to the results folder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch

from benchmarks.command import cost_parser, run
from benchmarks.measure import environment, measured
from benchmarks.ours import adapter_kept, border_bytes, ours
from benchmarks.subjects import Subject, llama, with_lora

VOCABULARY = 2048  # small, so that the decoder is what is seen
WARM_UP = 2  # samples of an unmeasured run before


def main() -> None:
    arguments = _parse()
    device = torch.device(arguments.device)
    at = {"device": arguments.device, "hidden": arguments.hidden, "length": arguments.length}
    at |= {"batch_size": arguments.batch_size, "repeats": arguments.repeats, "one_pass": arguments.one_pass}
    result: dict[str, Any] = {**environment(device), "settings": vars(arguments) | {"output": str(arguments.output)}}
    depths = [{**at, "depth": depth, "samples": arguments.samples} for depth in arguments.depths]
    counts = [{**at, "depth": arguments.depth, "samples": count} for count in arguments.sample_counts]
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"curves_{device.type}.json"
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, along, points in (("depth", "depth", depths), ("samples", "samples", counts)):
            measured_points = []
            for found in pool.imap(point, points, chunksize=1):
                measured_points.append(found)
                print(f"{along} {found[along]}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
            result[name] = {"points": measured_points, **shape_of(measured_points, along)}
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    chart(result, path.with_suffix(".png"))
    print(json.dumps({name: shape_of(result[name]["points"], name) for name in ("depth", "samples")}, indent=1))


def point(at: dict[str, Any]) -> dict[str, Any]:
    """Initialise one model, `repeats` times: every cost and its medians."""
    device = torch.device(at["device"])
    config = llama(at["hidden"], 3 * at["hidden"], at["depth"], max(1, at["hidden"] // 64), 1, VOCABULARY)
    subject = Subject("curve", config, at["samples"], at["length"], at["batch_size"])
    model, loader = with_lora(subject.build("nf4", device)), subject.loader()
    segments = None if at["one_pass"] else at["depth"]
    with adapter_kept(model):
        ours(model, loader, WARM_UP, segments)
    costs, reports = [], []
    for _ in range(at["repeats"]):
        with adapter_kept(model):
            report, cost = measured(lambda: ours(model, loader, at["samples"], segments), device)
        costs.append(cost)
        reports.append({name: getattr(report, name) for name in ("timings", "plan", "forecast", "tokens")})
    increases = [cost.cpu_increase if cost.gpu_increase is None else cost.gpu_increase for cost in costs]
    return {
        **at,
        "seconds": median(cost.seconds for cost in costs),
        "beyond_weights": median(increases),  # bytes, on the model's device
        "cpu_increase": median(cost.cpu_increase for cost in costs),
        "at_borders": border_bytes(model, loader, at["samples"], segments),
        "at_borders_forecast": reports[-1]["forecast"]["cpu"],
        "costs": [asdict(cost) for cost in costs],
        "reports": reports,
    }


def shape_of(points: list[dict[str, Any]], along: str) -> dict[str, Any]:
    """Tell how straight the line of times is (its farthest point, relative), how flat memory (largest ÷ smallest)."""
    if len(points) < 2:
        return {}
    x, seconds = [float(p[along]) for p in points], [p["seconds"] for p in points]
    slope, intercept = linear_regression(x, seconds)
    off = max(abs(slope * a + intercept - b) / b for a, b in zip(x, seconds, strict=True))
    memory = [max(p["beyond_weights"], 1) for p in points]
    return {
        "seconds_each": slope,
        "seconds_fixed": intercept,
        "farthest_from_line": off,
        "memory_largest_over_smallest": max(memory) / min(memory),
        "farthest_from_forecast": max(abs(p["at_borders"] / max(p["at_borders_forecast"], 1) - 1) for p in points),
    }


def chart(result: dict[str, Any], path: Path) -> None:
    """Draw time above, memory below; against depth on the left, against samples on the right."""
    from matplotlib.figure import Figure

    on_gpu = result["hardware"]["gpu"] is not None
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, along in enumerate(("depth", "samples")):
        points = result[along]["points"]
        x = [p[along] for p in points]
        time, memory = axes[0][column], axes[1][column]
        time.plot(x, [p["seconds"] for p in points], "o-")
        time.set(ylabel="seconds", ylim=(0, None))
        kind = "GPU memory beyond the weights" if on_gpu else "resident memory, increase"
        memory.plot(x, [p["beyond_weights"] / 2**20 for p in points], "o-", label=kind)
        if on_gpu:
            memory.plot(x, [p["cpu_increase"] / 2**20 for p in points], "s-", label="resident memory, increase")
        memory.plot(x, [p["at_borders"] / 2**20 for p in points], "s-", label="hidden states at borders")
        memory.plot(x, [p["at_borders_forecast"] / 2**20 for p in points], "x--", label="the same, forecast")
        memory.set(ylabel="MiB", ylim=(0, None), xlabel="decoder layers" if along == "depth" else "samples")
        memory.legend()
    figure.savefig(path, dpi=120)


def _parse() -> argparse.Namespace:
    parser = cost_parser(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--samples", type=int, default=32, help="samples on the curve over depths")
    parser.add_argument("--sample-counts", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--depth", type=int, default=8, help="decoder layers on the curve over samples")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--one-pass", action="store_true", help="one ordinary pass instead of streaming")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
