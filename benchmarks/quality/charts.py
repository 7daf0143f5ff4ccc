"""The charts of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.analysis import PLAIN, Comparison
from benchmarks.quality.intervals import mean, spread
from benchmarks.quality.pairs import diverged, mean_curve
from benchmarks.quality.sections import Section
from benchmarks.quality.sensitivity import PRESET, Line


def rates(section: Section, path: Path) -> None:
    """Final loss against the learning rate, a panel for each task; a cross at the top where a seed diverged."""
    figure, axes = _panels(section)
    for comparison, axis in zip(section.comparisons, axes, strict=True):
        axis.set(xscale="log", xlabel="learning rate", ylabel="final held-out loss")
        for label, style in _styles(section):
            runs = comparison.starts.get(label)
            if runs is None:
                continue
            crosses = diverged(comparison, label)
            sound = [rate for rate in runs.by_rate if rate not in crosses]
            finals = [list(runs.finals(rate).values()) for rate in sound]
            bars = [spread(values) if len(values) > 1 else 0.0 for values in finals]
            axis.errorbar(sound, [mean(values) for values in finals], bars, label=label, marker="o", capsize=2, **style)
            top = axis.get_xaxis_transform()
            axis.plot(crosses, [0.98] * len(crosses), "x", transform=top, color=style["color"])
    _save(figure, axes, path)


def steps(section: Section, path: Path) -> None:
    """Held-out loss against the step at each start's best rate, means over seeds; dashed: plain LoRA's final loss."""
    figure, axes = _panels(section)
    for comparison, axis in zip(section.comparisons, axes, strict=True):
        axis.set(xlabel="step", ylabel="held-out loss")
        for label, style in _styles(section):
            curve = _curve(comparison, label)
            if curve:
                rate = comparison.rate(label)
                axis.plot(*zip(*curve, strict=True), label=f"{label}, {rate:.3g}", **style)
            if curve and label == PLAIN:
                axis.axhline(curve[-1][1], color="black", linestyle="--", linewidth=0.8)
    _save(figure, axes, path)


def sensitivity(lines: Sequence[Line], path: Path) -> None:
    """Final loss at the best rate against each setting that was varied; a panel for each setting and task."""
    panels: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        at = line.conditions
        panels.setdefault((line.knob, f"{at.split}, {at.task}"), []).append(line)
    figure, axes = _figure(len(panels))
    for ((knob, where), members), axis in zip(panels.items(), axes, strict=True):
        axis.set(xscale="log", xlabel=knob, ylabel="final held-out loss", title=where)
        for line in members:
            points = [point for point in line.points if point.value != PRESET and point.value > 0 and point.finals]
            y = [mean(point.finals.values()) for point in points]
            name = line.start if knob == "rank" else f"{line.start}, rank {line.conditions.rank}"
            axis.plot([point.value for point in points], y, "o-", label=name)
    _save(figure, axes, path)


def _curve(comparison: Comparison, label: str) -> list[tuple[int, float]]:
    results = comparison.starts[label].at(comparison.rate(label)) if label in comparison.starts else {}
    return [point for point in mean_curve(results, results) if math.isfinite(point[1])]


def _styles(section: Section) -> list[tuple[str, dict[str, Any]]]:
    """Each start's colour, the same in every panel; plain LoRA black and on top."""
    colours = [f"C{k}" for k in range(10)]
    dashes = ["-", "--", ":", "-."]  # where there are more starts than colours
    found = []
    for k, label in enumerate(label for label in section.labels if label != PLAIN):
        found.append((label, {"color": colours[k % 10], "linestyle": dashes[k // 10 % 4], "linewidth": 1.2}))
    return [(PLAIN, {"color": "black", "linewidth": 2.0, "zorder": 5}), *found]


def _panels(section: Section) -> tuple[Any, list[Any]]:
    figure, axes = _figure(len(section.comparisons))
    figure.suptitle(section.title)
    for comparison, axis in zip(section.comparisons, axes, strict=True):
        axis.set_title(comparison.conditions.task)
    return figure, axes


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(7 * columns, 5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def _save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
