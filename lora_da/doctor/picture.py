"""The loss over the rows, as a picture, where matplotlib is there."""

from __future__ import annotations

from pathlib import Path

from lora_da.errors import LoraDAError
from lora_da.findings import DataReport

COLOURS = {"loss": "tab:red", "prompt": "tab:orange", "cut": "tab:purple"}


def draw(report: DataReport, path: Path) -> str:
    """Write the picture; returns why it was not drawn, or nothing.

    Raises:
        LoraDAError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no matplotlib"
    if not report.losses:
        return "no losses"
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="row", ylabel="loss per loss token")
    mean = {row.row: row.mean for row in report.losses}
    axes.plot(list(mean), list(mean.values()), ".", color="0.7", label=f"{len(mean):,} rows")
    for reason, colour in COLOURS.items():
        rows = [row for row in report.rows_by(reason) if row in mean]
        if rows:
            label = report.sentence(reason)
            axes.plot(rows, [mean[row] for row in rows], "o", color=colour, fillstyle="none", label=label)
    axes.legend(loc="upper left", fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise LoraDAError(f"{path} cannot be written: {error}") from error
    return ""
