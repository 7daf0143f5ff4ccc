"""How many documents the first step's length needs, and which length to try first: `python -m benchmarks.first_length
--task nl2bash`.

A start that is solved for all rows of lora_A is looked at over a ladder of lengths, row by row, on rows that nobody has
seen. From these losses the search of `lora_da.first_step` is replayed on many random choices of a few rows, from each
first length: what is lost on the other rows to the best length for them, and how many forwards of a document it takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.command import RESULTS, run
from benchmarks.markdown import table
from benchmarks.measure import environment
from benchmarks.qlora import lora_config
from benchmarks.quality.base import SMOLLM2, load_base
from benchmarks.quality.corpora import split_rows, spread
from benchmarks.quality.heldout import BATCH as AT_ONCE
from benchmarks.sample_size import BATCH, LENGTH, RANK, TASKS
from benchmarks.step_length import ONE_FISHER_LENGTH, POPULATION, SAMPLES, ladder, lengths
from benchmarks.tokenized_rows import Row
from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.first_step import MOST_TRIALS, search
from lora_da.samples.rows import collate
from lora_da.samples.tokens import IGNORED

ROWS = 96
DOCUMENTS = (4, 8, 16, 32)
FIRST = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
CHOICES = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha-over-r", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "first_length", help="folder")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_base(SMOLLM2, "twin", device)
    rows = split_rows(TASKS[asked.task], tokenizer, "development", LENGTH, ROWS, SAMPLES, asked.seed)
    loader: DataLoader[Any] = DataLoader(rows.train, BATCH, collate_fn=collate)  # type: ignore[arg-type]
    heldout = spread(rows.heldout, ROWS)
    model = get_peft_model(base, lora_config(RANK, asked.alpha_over_r))
    config = LoraDAConfig(first_step="gamma", chosen_rows=1, samples=SAMPLES, population_size=POPULATION)
    report = initialize_lora_da_weights(model, loader, config, show_progress=False)
    seen: list[Tensor] = []

    def loss() -> float:
        seen.append(row_losses(base, heldout, device))
        return float(seen[-1].sum())

    with model.disable_adapter():
        loss()
    ladder(model, report, ONE_FISHER_LENGTH, loss)
    losses = dict(zip([0.0, *lengths()], seen, strict=True))
    counts = torch.tensor([sum(label != IGNORED for label in row["labels"][1:]) for row in heldout])
    result: dict[str, Any] = {
        "task": asked.task,
        "seed": asked.seed,
        "alpha_over_r": asked.alpha_over_r,
        **environment(device),
        "losses": [(length, float(found.sum() / counts.sum())) for length, found in losses.items()],
        "searches": replayed(losses, counts),
    }
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"{asked.task}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


@torch.no_grad()
def row_losses(model: Any, rows: list[Row], device: torch.device) -> Tensor:
    """Sum the loss of each row's tokens, (rows,), in float64."""
    sums = []
    for first in range(0, len(rows), AT_ONCE):
        batch = {key: value.to(device) for key, value in collate(rows[first : first + AT_ONCE]).items()}
        targets = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        sums.append(losses.double().sum(1).cpu())
    return torch.cat(sums)


def replayed(losses: dict[float, Tensor], counts: Tensor) -> list[dict[str, float]]:
    """Search from each first length on random rows, as often as `CHOICES` says.

    Args:
        losses: by length, 0 among them: sum over the loss tokens of each row, (rows,).
        counts: loss tokens of each row, (rows,).

    Returns:
        For each first length and number of documents: `lost`, the loss of a token of the other rows above that at the
        best length for them, and `forwards`, of a document; means over the choices.
    """
    found = []
    for first in FIRST:
        for n in DOCUMENTS:
            generator = torch.Generator().manual_seed(n)
            lost, forwards = 0.0, 0
            for _ in range(CHOICES):
                order = torch.randperm(len(counts), generator=generator)
                tried = search(mean_loss(losses, counts, order[:n]), first)
                elsewhere = mean_loss(losses, counts, order[n:])
                lost += elsewhere(min(tried, key=tried.__getitem__)) - min(map(elsewhere, losses))
                forwards += n * len(tried)
            found.append({"first": first, "documents": n, "lost": lost / CHOICES, "forwards": forwards / CHOICES})
    return found


def mean_loss(losses: dict[float, Tensor], counts: Tensor, rows: Tensor) -> Callable[[float], float]:
    """The mean loss of a token of these rows, by length; a length beyond the ladder is infinitely bad."""
    n = counts[rows].sum()
    return lambda length: float(losses[length][rows].sum() / n) if length in losses else float("inf")


def markdown(result: dict[str, Any]) -> str:
    """The two tables of one task."""
    header = ["first length", *(f"{n} documents" for n in DOCUMENTS)]
    lines = []
    for first in FIRST:
        of = {s["documents"]: s for s in result["searches"] if s["first"] == first}
        lines.append([f"{first:g}", *(f"{of[n]['lost']:.4f} ({of[n]['forwards']:.0f})" for n in DOCUMENTS)])
    steps, losses = zip(*result["losses"], strict=True)
    return "\n".join(
        [
            f"# {result['task']}: the search for the first step's length",
            "",
            f"`{result['command']}`, {result['date']}, {result['hardware']['cpu']}, "
            f"{result['hardware']['threads']} threads.",
            "",
            f"Held-out loss at each length, {ROWS} rows:",
            "",
            *table([f"{step:g}" for step in steps], [[f"{loss:.3f}" for loss in losses]]),
            "",
            f"What a search of at most {MOST_TRIALS} lengths loses on the other rows to the best length of the ladder "
            "(and forwards of a document):",
            "",
            *table(header, lines),
        ]
    )


if __name__ == "__main__":
    run(main)
