"""How far along a start's direction the loss falls, on the two-core subject: `python -m benchmarks.step_length --task
nl2bash`.

Forwards only: a start is solved on 64 documents, then its lora_B is scaled, all layers together, and the loss of rows
that nobody has seen is looked at over a ladder of lengths. Compared are the layers' shares (each one spectral norm,
as published; one length in the Fisher, as the default preset has it; or the natural gradient's own), and the
subspace (LoRA-DA's, or a random one with the best step in it). The ladder is in root mean squares, over the layers, of
the spectral norm of s·lora_B·lora_A.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader

from benchmarks.command import RESULTS, run
from benchmarks.markdown import table
from benchmarks.measure import environment
from benchmarks.qlora import lora_config
from benchmarks.quality.base import SMOLLM2, load_base
from benchmarks.quality.candidates import CANDIDATES
from benchmarks.quality.corpora import split_rows, spread
from benchmarks.quality.heldout import Heldout
from benchmarks.sample_size import BATCH, HELD_OUT, LENGTH, RANK, TASKS
from lora_da import InitReport, LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.config import PRESETS
from lora_da.first_step import spectral_norm
from lora_da.samples.rows import collate

SAMPLES, POPULATION = 64, 2000
LONGEST, SHORTEST = 0, -7  # powers of two
AS_SOLVED, ONE_FISHER_LENGTH = "as solved", "one length in the Fisher"
NATURAL = replace(PRESETS["default"], normalize_step=False, gamma=1.0, chosen_rows=1)
STARTS: Mapping[str, tuple[LoraDAConfig, str]] = {
    "one spectral norm": (LoraDAConfig(first_step="gamma", chosen_rows=1), AS_SOLVED),
    "one length in the Fisher": (LoraDAConfig(first_step="gamma", chosen_rows=1), ONE_FISHER_LENGTH),
    "the natural gradient's own": (LoraDAConfig(preset=NATURAL, first_step="gamma"), AS_SOLVED),
    "random A, one length in the Fisher": (
        LoraDAConfig(method=CANDIDATES["random_A"], first_step="gamma"),
        ONE_FISHER_LENGTH,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "step_length", help="folder")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_base(SMOLLM2, "twin", device)
    rows = split_rows(TASKS[asked.task], tokenizer, "development", LENGTH, HELD_OUT, SAMPLES, asked.seed)
    loader: DataLoader[Any] = DataLoader(rows.train[:SAMPLES], BATCH, collate_fn=collate)  # type: ignore[arg-type]
    heldout = Heldout(spread(rows.heldout, HELD_OUT), None, device)
    result: dict[str, Any] = {"task": asked.task, "seed": asked.seed, **environment(device), "starts": {}}
    result["base_loss"] = heldout.measure(base)[0]
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"{asked.task}.json"
    for name, (config, shares) in STARTS.items():
        model = get_peft_model(base, lora_config(RANK, 2.0))
        config = replace(config, samples=SAMPLES, population_size=POPULATION)
        report = initialize_lora_da_weights(model, loader, config, show_progress=False)
        result["starts"][name] = ladder(model, report, shares, lambda: heldout.measure(base)[0])
        model.unload()
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({name: result["starts"][name]}), flush=True)
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    chart(result, path.with_suffix(".png"))
    print(markdown(result))


def ladder(model: PeftModel, report: InitReport, shares: str, loss: Callable[[], float]) -> dict[str, Any]:
    """Look at a direction at each length of the ladder: `losses` by length, and `solved`, the length that it was
    solved at."""
    adapter = find_adapter(model)
    factors, norms = {}, []
    for layer in adapter.layers:
        a, b = layer.factors()
        length = report.layers[layer.name].fisher_length
        if shares == ONE_FISHER_LENGTH:
            assert length, "the method knows no length"
            b /= length
        factors[layer.name] = a, b
        norms.append(layer.scaling * spectral_norm(a, b))
    solved = math.sqrt(sum(norm**2 for norm in norms) / len(norms))
    losses = {}
    for length in lengths():
        adapter.write({name: (a, b * (length / solved)) for name, (a, b) in factors.items()})
        losses[length] = loss()
    return {"solved": solved, "losses": sorted(losses.items())}


def lengths() -> Iterator[float]:
    """The ladder, the shortest first."""
    return (2.0**power for power in range(SHORTEST, LONGEST + 1))


def markdown(result: dict[str, Any]) -> str:
    """The table of one task."""
    steps = [f"{length:g}" for length in lengths()]
    lines = []
    for name, found in result["starts"].items():
        losses = [loss for _, loss in found["losses"]]
        best = min(losses)
        lines.append([name, *(f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in losses), f"{found['solved']:.3g}"])
    return "\n".join(
        [
            f"# {result['task']}: held-out loss along a start's direction, at the base {result['base_loss']:.3f}",
            "",
            f"`{result['command']}`, {result['date']}, {result['hardware']['cpu']}, "
            f"{result['hardware']['threads']} threads.",
            "",
            *table(["layers' shares", *steps, "as solved"], lines),
        ]
    )


def chart(result: dict[str, Any], path: Path) -> None:
    """Losses over lengths."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, found in result["starts"].items():
        axes.plot(*zip(*found["losses"], strict=True), marker="o", label=name)
    axes.axhline(result["base_loss"], color="grey", label="base")
    axes.set(xscale="log", xlabel="length", ylabel="held-out loss", title=result["task"])
    axes.set_ylim(top=result["base_loss"] * 1.1)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
