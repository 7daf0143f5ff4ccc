"""The table and the chart of one run, made from its JSON: `python -m benchmarks.report FILE.json …`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.command import run
from benchmarks.errors import BenchmarkError
from benchmarks.markdown import table
from benchmarks.targets import Target, medians, targets
from lora_da.memory import GIB

PARTS = ("forward", "head", "backward", "products", "solve", "copies", "gradient", "fisher", "first step")
NOT_MEASURED = "not yet measured"


def write_report(path: Path) -> str:
    """Write the Markdown table and the chart beside the JSON, and the medians and ratios into it; return the Markdown.

    Raises:
        BenchmarkError: the file is not there.
    """
    if not path.exists():
        raise BenchmarkError(f"there is no {path}")
    result = json.loads(path.read_text(encoding="utf-8"))
    result["medians"] = [{"row": name, "base": base, **found} for (name, base), found in medians(result).items()]
    ratios = targets(result)
    result["targets"] = [{**vars(ratio), "met": ratio.met(result["device"])} for ratio in ratios]
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    markdown = "\n".join([*_heading(result), "", *_costs(result), *_targets(ratios, result["device"])])
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    _chart(result, path.with_suffix(".png"))
    return markdown


def _heading(result: dict[str, Any]) -> list[str]:
    data, hardware, gpu = result["data"], result["hardware"], result["hardware"]["gpu"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads"
    if gpu:
        machine = f"{gpu['name']} ({gpu['memory_gib']} GiB; {gpu['driver']}; CUDA {gpu['cuda']}), {machine}"
    return [
        f"# {result['model']}: {data['samples']} samples, {data['tokens']:,} tokens",
        "",
        f"`{result['command']}`, {result['date']}, medians of up to {result['repeats']} interleaved repeats.",
        f"{machine}. {versions}.",
    ]


def _costs(result: dict[str, Any]) -> list[str]:
    on_gpu = result["device"] == "cuda"
    memory = ["GPU peak, GiB", "over the start"] if on_gpu else []
    header = ["row", "base", "repeats", "seconds", "range", *memory, "resident peak, GiB", "over the start", "split"]
    lines = []
    for entry in result["medians"]:
        if "error" in entry:
            lines.append([entry["row"], entry["base"], "0", entry["error"].splitlines()[0][:80]])
            continue
        sizes = [entry["gpu_peak"], entry["gpu_increase"]] if on_gpu else []
        sizes += [entry["cpu_peak"], entry["cpu_increase"]]
        split = ", ".join(f"{part} {entry['timings'][part]:.2f}" for part in PARTS if part in entry["timings"])
        cells = [entry["row"], entry["base"], str(entry["repeats"]), f"{entry['seconds']:.2f}"]
        cells += [f"{entry['fastest']:.2f}–{entry['slowest']:.2f}", *(f"{size / GIB:.2f}" for size in sizes)]
        lines.append([*cells, "; ".join(text for text in (split, entry["note"]) if text)])
    return table(header, lines)


def _targets(ratios: list[Target], device: str) -> list[str]:
    lines = []
    for ratio in ratios:
        value = NOT_MEASURED if ratio.value is None else f"{ratio.value:.2f} {ratio.unit}".strip()
        value += {True: " ✓", False: " ✗ missed", None: ""}[ratio.met(device)]
        cpu, gpu = (NOT_MEASURED, value) if device == "cuda" else (value, NOT_MEASURED)
        lines.append([ratio.name, ratio.cpu or "–", cpu, ratio.gpu or "–", gpu])
    return table(["ratio", "CPU target", "CPU", "GPU target", "GPU"], lines)


def _chart(result: dict[str, Any], path: Path) -> None:
    """Draw seconds and peak memory of each entry, as bars."""
    from matplotlib.figure import Figure

    memory = "gpu_peak" if result["device"] == "cuda" else "cpu_peak"
    entries = [entry for entry in result["medians"] if "error" not in entry][::-1]
    names = [f"{entry['row']}, {entry['base']}" for entry in entries]
    figure = Figure(figsize=(11, 0.4 * len(entries) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [entry["seconds"] for entry in entries], color="tab:blue")
    left.set_xlabel("seconds")
    right.barh(names, [entry[memory] / GIB for entry in entries], color="tab:orange")
    right.set_xlabel(f"peak {'GPU' if memory == 'gpu_peak' else 'resident'} memory, GiB")
    figure.suptitle(f"{result['model']}, {result['data']['samples']} samples, {result['data']['tokens']:,} tokens")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    for path in parser.parse_args().files:
        print(write_report(path))


if __name__ == "__main__":
    run(main)
