"""What a start loses with fewer samples, on the two-core subject: `python -m benchmarks.sample_size --task nl2bash`.

From 8 to 512 documents, each start made as a user makes it. Of each: how much of the bias term ‖D‖² of 512 documents
lies in the chosen subspaces, and the loss on rows that are not trained on before the first training step. Against it
stands what it costs: the time of the initialisation in training steps of 8 rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.command import RESULTS, run
from benchmarks.markdown import table
from benchmarks.measure import environment
from benchmarks.qlora import lora_config
from benchmarks.quality.base import SMOLLM2, load_base
from benchmarks.quality.corpora import Corpus, split_rows, spread
from benchmarks.quality.heldout import Heldout
from benchmarks.tokenized_rows import Row
from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import AdapterLayer, find_adapter
from lora_da.collect import Observed, collect
from lora_da.config import PRESETS
from lora_da.first_step import DOCUMENTS
from lora_da.methods import METHODS
from lora_da.methods.lora_da import damp_input
from lora_da.model.sharding import compute_device
from lora_da.model.state import drawing_mode, estimation_mode
from lora_da.processes import Processes, Run
from lora_da.samples.draw import Size, draw
from lora_da.samples.rows import collate
from lora_da.tasks import find_task

SIZES = (8, 16, 32, 64, 128, 256)
REFERENCE = 512
POPULATION = 2000  # the same for all, so that nothing but the samples differs
LENGTH, HELD_OUT, BATCH, RANK = 160, 64, 8, 8
TASKS = {
    "nl2bash": Corpus("nl2bash", "nl2bash_train.jsonl", "nl2bash_test.jsonl", "prompt", "completion"),
    "gsm8k": Corpus("gsm8k", "gsm8k_train.jsonl", "gsm8k_test.jsonl"),
    "e2e": Corpus("e2e", "e2e_train.jsonl", "e2e_test.jsonl", "prompt", "completion"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "sample_size", help="folder")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_base(SMOLLM2, "twin", device)
    rows = split_rows(TASKS[asked.task], tokenizer, "development", LENGTH, HELD_OUT, REFERENCE + DOCUMENTS, asked.seed)
    heldout = Heldout(spread(rows.heldout, HELD_OUT), None, device)
    result: dict[str, Any] = {"task": asked.task, "seed": asked.seed, **environment(device), "starts": []}
    result["base_loss"] = heldout.measure(base)[0]
    result["step_seconds"] = step_seconds(base, rows.train[:BATCH], device)
    subspaces = {}
    for size in SIZES:
        model = get_peft_model(base, lora_config(RANK, 2.0))
        start, subspaces[size] = started(model, rows.train[:size], rows.train[REFERENCE:], heldout)
        result["starts"].append(start)
        model.unload()
        print(json.dumps(start), flush=True)
    model = get_peft_model(base, lora_config(RANK, 2.0))
    captured = captured_by(model, rows.train[:REFERENCE], subspaces)
    for start in result["starts"]:
        start["captured"] = captured[start["samples"]]
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"{asked.task}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    chart(result, path.with_suffix(".png"))
    print(markdown(result))


def started(
    model: PeftModel, samples: Sequence[Row], others: Sequence[Row], heldout: Heldout
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Start an adapter on the samples, its first step measured on the others: figures, and orthonormal bases (i, r) of
    the chosen subspaces by layer."""
    loader: DataLoader[Any] = DataLoader([*samples, *others], BATCH, collate_fn=collate)  # type: ignore[arg-type]
    config = LoraDAConfig(samples=len(samples), population_size=POPULATION, chosen_rows=1)
    report = initialize_lora_da_weights(model, loader, config, show_progress=False)
    step = report.first_step
    assert step is not None and report.samples == len(samples)
    figures = {
        "samples": report.samples,
        "tokens": report.tokens,
        "loss_tokens": report.loss_tokens,
        "loss": heldout.measure(model.get_base_model())[0],
        "length": step.length,
        "seconds": report.seconds,
        "first_step_seconds": step.seconds,
        "solve_seconds": report.timings["solve"],
    }
    bases = {a.name: torch.linalg.qr(a.factors()[0].double().T)[0].float() for a in find_adapter(model).layers}
    return figures, bases


def captured_by(
    model: PeftModel, samples: Sequence[Row], subspaces: dict[int, dict[str, Tensor]]
) -> dict[int, dict[str, float]]:
    """Share of ‖D‖²_F of these samples, by layer, in each of the subspaces."""
    method, preset = METHODS["lora_da"], PRESETS["default"]
    task = find_task(model.get_base_model())
    where = Run(Processes(), compute_device(task.model, task.blocks), None, False)
    loader: DataLoader[Any] = DataLoader(list(samples), BATCH, collate_fn=collate)  # type: ignore[arg-type]
    with drawing_mode():
        data = draw(loader, Size(len(samples)), None, POPULATION, task.read, True)

    def shares(layer: AdapterLayer, observed: Observed) -> dict[int, float]:
        seen = observed.statistics
        assert seen.grad is not None and seen.output_fisher is not None
        fisher = seen.output_fisher + preset.damping * seen.output_fisher.mean()
        direction = damp_input(seen.input_cov, preset).solve((seen.grad / fisher.unsqueeze(1)).T)  # D (i, o)
        whole = direction.square().sum()
        return {n: float((bases[layer.name].T @ direction).square().sum() / whole) for n, bases in subspaces.items()}

    with estimation_mode(model):
        collected = collect(task, find_adapter(model).layers, data, method.needs_with(preset), where, shares)
    found = {name: outcome for name, outcome in collected.layers.outcomes.items() if isinstance(outcome, dict)}
    return {n: {name: shares_of[n] for name, shares_of in found.items()} for n in subspaces}


def step_seconds(base: Any, rows: Sequence[Row], device: torch.device) -> float:
    """Wall time of the forward and backward of a training step of these rows: the least of three."""
    model = get_peft_model(base, lora_config(RANK, 2.0))
    batch = {key: value.to(device) for key, value in collate(rows).items()}
    times = []
    for _ in range(3):
        began = time.perf_counter()
        model(**batch).loss.backward()
        times.append(time.perf_counter() - began)
    model.unload()
    return min(times)


def markdown(result: dict[str, Any]) -> str:
    """The table of one task."""
    header = [
        "samples",
        "loss tokens",
        "captured, median",
        "captured, lowest tenth",
        "loss at step 0",
        "seconds",
        "steps",
    ]
    lines = []
    for start in result["starts"]:
        shares = torch.tensor(sorted(start["captured"].values()))
        lines.append(
            [
                str(start["samples"]),
                f"{start['loss_tokens']:,}",
                f"{shares.median():.2f}",
                f"{shares.quantile(0.1):.2f}",
                f"{start['loss']:.4f}",
                f"{start['seconds']:.0f}",
                f"{start['seconds'] / result['step_seconds']:.1f}",
            ]
        )
    return "\n".join(
        [
            f"# {result['task']}: starts from fewer samples, loss of the base {result['base_loss']:.4f}",
            "",
            f"`{result['command']}`, {result['date']}, {result['hardware']['cpu']}, "
            f"{result['hardware']['threads']} threads.",
            "",
            *table(header, lines),
            "",
        ]
    )


def chart(result: dict[str, Any], path: Path) -> None:
    """Captured share and loss over the samples."""
    sizes = [start["samples"] for start in result["starts"]]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    captured, loss = figure.subplots(1, 2)
    for quantile, label in ((0.1, "lowest tenth"), (0.5, "median"), (0.9, "highest tenth")):
        values = [float(torch.tensor(list(s["captured"].values())).quantile(quantile)) for s in result["starts"]]
        captured.plot(sizes, values, marker="o", label=label)
    captured.set(xscale="log", xlabel="samples", ylabel=f"share of the bias term of {REFERENCE} samples", ylim=(0, 1))
    captured.legend()
    loss.plot(sizes, [start["loss"] for start in result["starts"]], marker="o", label="at step 0")
    loss.axhline(result["base_loss"], color="grey", label="base")
    loss.set(xscale="log", xlabel="samples", ylabel="held-out loss")
    loss.legend()
    figure.suptitle(result["task"])
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
