"""The chart of a stage, from nothing but its JSON: a column of bars for each unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What a figure's name ends in, and what that is called on the axis.
UNITS = {
    "seconds": "seconds",
    "gib": "GiB",
    "tflops": "TFLOP/s",
    "launches": "kernel launches",
    "calls": "calls",
    "tests": "tests",
    "difference": "relative difference",
    "loss": "loss",
}
INCH = 0.22  # a bar


def bars(content: dict[str, Any]) -> dict[str, list[tuple[str, float]]]:
    """Each figure that has a unit, with the part that it is of, by its unit."""
    found: dict[str, list[tuple[str, float]]] = {}
    for part, outcome in content["parts"].items():
        for name, value in outcome.get("figures", {}).items():
            what, _, unit = name.rpartition("_")
            unit = unit if what else name
            if unit in UNITS and isinstance(value, (int, float)):
                label = f"{part}: {what.replace('_', ' ')}".removesuffix(": ")
                found.setdefault(unit, []).append((label, float(value)))
    return found


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw it; nothing where there is no figure to be drawn."""
    from matplotlib.figure import Figure

    found = bars(content)
    if not found:
        return
    tallest = max(map(len, found.values()))
    figure = Figure(figsize=(7 * len(found), INCH * tallest + 1.5), layout="constrained")
    for axes, (unit, values) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        drawn = axes.barh(range(len(values)), [value for _, value in values])
        axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
        axes.set_yticks(range(len(values)), [label for label, _ in values], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(UNITS[unit])
    figure.suptitle(f"{content['stage']}: {content['device']}")
    figure.savefig(path, dpi=110)
