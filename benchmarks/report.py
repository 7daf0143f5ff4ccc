"""The table and the chart of one run, made from its JSON: `python -m benchmarks.report results/*.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.targets import GIB, Target, medians, targets

PARTS = ("forward", "head", "backward", "products", "solve", "copies", "gradient", "fisher")
NOT_MEASURED = "not yet measured"


def write_report(path: Path) -> str:
    """Write the Markdown table and the chart beside the JSON, and the medians and ratios into it; the Markdown."""
    result = json.loads(path.read_text(encoding="utf-8"))
    result["medians"] = [{"row": row, "base": base, **found} for (row, base), found in medians(result).items()]
    ratios = targets(result)
    result["targets"] = [{**vars(ratio), "met": ratio.met(result["device"])} for ratio in ratios]
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    markdown = "\n".join([*_heading(result), "", *_rows(result), "", *_targets(ratios, result["device"]), ""])
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


def _rows(result: dict[str, Any]) -> list[str]:
    on_gpu = result["device"] == "cuda"
    memory = ["GPU peak, GiB", "over the start"] if on_gpu else []
    header = ["row", "base", "repeats", "seconds", "range", *memory, "resident peak, GiB", "over the start", "split"]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in result["medians"]:
        if "error" in row:
            lines.append(_line([row["row"], row["base"], "0", row["error"].splitlines()[0][:80]]))
            continue
        sizes = [row["gpu_peak"], row["gpu_increase"]] if on_gpu else []
        sizes += [row["cpu_peak"], row["cpu_increase"]]
        split = ", ".join(f"{part} {row['timings'][part]:.2f}" for part in PARTS if part in row["timings"])
        cells = [row["row"], row["base"], str(row["repeats"]), f"{row['seconds']:.2f}"]
        cells += [f"{row['fastest']:.2f}–{row['slowest']:.2f}", *(f"{size / GIB:.2f}" for size in sizes)]
        lines.append(_line([*cells, "; ".join(text for text in (split, row["note"]) if text)]))
    return lines


def _targets(ratios: list[Target], device: str) -> list[str]:
    header = ["ratio", "CPU target", "CPU", "GPU target", "GPU"]
    lines = [_line(header), _line(["---"] * len(header))]
    for ratio in ratios:
        value = NOT_MEASURED if ratio.value is None else f"{ratio.value:.2f} {ratio.unit}".strip()
        value += {True: " ✓", False: " ✗ missed", None: ""}[ratio.met(device)]
        cpu, gpu = (NOT_MEASURED, value) if device == "cuda" else (value, NOT_MEASURED)
        lines.append(_line([ratio.name, ratio.cpu or "–", cpu, ratio.gpu or "–", gpu]))
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _chart(result: dict[str, Any], path: Path) -> None:
    """Seconds and peak memory of each row, as bars."""
    from matplotlib.figure import Figure

    memory = "gpu_peak" if result["device"] == "cuda" else "cpu_peak"
    rows = [row for row in result["medians"] if "error" not in row][::-1]
    names = [f"{row['row']}, {row['base']}" for row in rows]
    figure = Figure(figsize=(11, 0.4 * len(rows) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [row["seconds"] for row in rows], color="tab:blue")
    left.set_xlabel("seconds")
    right.barh(names, [row[memory] / GIB for row in rows], color="tab:orange")
    right.set_xlabel(f"peak {'GPU' if memory == 'gpu_peak' else 'resident'} memory, GiB")
    figure.suptitle(f"{result['model']}, {result['data']['samples']} samples, {result['data']['tokens']:,} tokens")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(write_report(Path(name)))
