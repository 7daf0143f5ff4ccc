"""The charts of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.analysis import PLAIN
from benchmarks.quality.intervals import mean, spread
from benchmarks.quality.pairs import diverged, mean_curve
from benchmarks.quality.sections import Section
from benchmarks.quality.sensitivity import PRESET, Line, Point


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
        _ticks(axis, [rate for runs in comparison.starts.values() for rate in runs.by_rate])
    _save(figure, axes, path)


def steps(section: Section, path: Path) -> None:
    """Held-out loss against the step, each start at its best rate; below, how far it is from plain LoRA's there.

    Means over seeds; in the difference, over those that both have.
    """
    figure, axes = _panels(section, rows=2)
    for column, comparison in enumerate(section.comparisons):
        upper, lower = axes[column], axes[len(section.comparisons) + column]
        upper.set(xlabel="step", ylabel="held-out loss")
        lower.set(xlabel="step", ylabel="loss ÷ plain LoRA's − 1, %")
        for label, style in _styles(section):
            results, plain = (comparison.results(name, comparison.rate(name)) for name in (label, PLAIN))
            if not results:
                continue
            upper.plot(*_xy(mean_curve(results, results)), label=f"{label}, {comparison.rate(label):.3g}", **style)
            shared = [seed for seed in results if seed in plain]
            if shared and not comparison.starts[label].own_base:
                reference = dict(mean_curve(plain, shared))
                curve = [(step, loss) for step, loss in mean_curve(results, shared) if step in reference]
                lower.plot(*_xy([(step, 100 * (loss / reference[step] - 1)) for step, loss in curve]), **style)
    _save(figure, axes, path)


def sensitivity(lines: Sequence[Line], path: Path) -> None:
    """Final loss at the best rate against each setting that was varied; a panel for each setting and task."""
    panels: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        at = line.conditions
        panels.setdefault((line.knob, f"{at.split}, {at.task}"), []).append(line)
    figure, axes = _figure(len(panels), min(2, len(panels)))
    for ((knob, where), members), axis in zip(panels.items(), axes, strict=True):
        axis.set(xscale="log", xlabel=knob, ylabel="final held-out loss", title=where)
        for line in members:
            points = [point for point in line.points if _drawn(point)]
            y = [mean(point.finals.values()) for point in points]
            name = line.start if knob == "rank" else f"{line.start}, rank {line.conditions.rank}"
            axis.plot([point.value for point in points], y, "o-", label=name)
        _ticks(axis, [point.value for line in members for point in line.points if _drawn(point)])
    _save(figure, axes, path)


def _drawn(point: Point) -> bool:
    """Has a place on a logarithmic axis, and a loss."""
    return point.value != PRESET and point.value > 0 and bool(point.finals)


def _xy(curve: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _styles(section: Section) -> list[tuple[str, dict[str, Any]]]:
    """Each start's colour, the same in every panel; plain LoRA black and on top."""
    colours = [f"C{k}" for k in range(10)]
    dashes = ["-", "--", ":", "-."]  # where there are more starts than colours
    found = []
    for k, label in enumerate(label for label in section.labels if label != PLAIN):
        found.append((label, {"color": colours[k % 10], "linestyle": dashes[k // 10 % 4], "linewidth": 1.2}))
    return [(PLAIN, {"color": "black", "linewidth": 2.0, "zorder": 5}), *found]


def _panels(section: Section, rows: int = 1) -> tuple[Any, list[Any]]:
    """A column for each task."""
    figure, axes = _figure(rows * len(section.comparisons), len(section.comparisons))
    figure.suptitle(section.title)
    for comparison, axis in zip(section.comparisons, axes, strict=False):
        axis.set_title(comparison.conditions.task)
    return figure, axes


def _figure(panels: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(7 * columns + 2, 5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """The values that were run, and no others."""
    axis.set_xticks(sorted(set(values)), [f"{value:.3g}" for value in sorted(set(values))], minor=False)
    axis.set_xticks([], minor=True)


def _save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
