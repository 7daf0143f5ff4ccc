"""What the check of the data finds of planted faults: `python -m benchmarks.planted_faults --task nl2bash`.

Two losses of every row are measured as `python -m lora_da --check` does: with its answer, and with another row's; and
its gradient as an initialisation does. Then, many times over, 5 % of the rows are given the other answer, 5 % are
repeated, and 2 % lose all their labels; counted is what is found, and how many of the other answers are among as many
rows with the highest loss, with the largest gradient, and with the least help of their prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.command import RESULTS, run
from benchmarks.measure import environment
from benchmarks.quality.corpora import data_file
from examples.smollm2 import prepare
from lora_da.doctor.losses import Row, row_losses
from lora_da.doctor.outliers import standing_out, with_large_gradients
from lora_da.doctor.rows import look_at
from lora_da.export.files import load_rows
from lora_da.export.rows import TokenizedRows
from lora_da.findings import RowLoss
from lora_da.model.state import reading_mode
from lora_da.samples.facts import row_facts
from lora_da.samples.rows import collate
from lora_da.tasks import find_task
from lora_da.tasks.head import LossPass
from lora_da.tasks.task import LanguageModel

TASKS = {
    "nl2bash": ("nl2bash_{}.jsonl", "completion"),
    "gsm8k": ("gsm8k_{}.jsonl", "answer"),
    "e2e": ("e2e_{}.jsonl", "completion"),
    "arc": ("arc_easy_{}.json", "output"),
}
OTHER_ANSWERS, REPEATED, MASKED = 0.05, 0.05, 0.02
LENGTH, DRAWS = 1024, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--split", choices=("train", "test"), default="test", help="the file (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=200, help="the first of the file (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="judge the losses on file, measure none")
    parser.add_argument("--output", type=Path, default=RESULTS / "planted_faults", help="folder")
    asked = parser.parse_args()
    file, answer = TASKS[asked.task]
    loaded = load_rows(data_file(file.format(asked.split)))
    rows: list[Any] = [loaded[number] for number in range(asked.rows)]
    folder = prepare()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    clean, others = (tokenized(r, tokenizer) for r in (rows, with_other_answers(rows, answer)))
    path = asked.output / f"{asked.task}_{asked.split}.json"
    if not asked.again:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        measured = {
            "task": asked.task,
            "split": asked.split,
            "rows": asked.rows,
            **environment(device),
            "losses": [dataclasses.astuple(row) for row in losses(base, clean, device)],
            "losses_with_other_answers": [dataclasses.astuple(row) for row in losses(base, others, device)],
            "gradient_norms": gradient_norms(base, clean, device),
            "gradient_norms_with_other_answers": gradient_norms(base, others, device),
        }
        write(path, measured)
    measured = json.loads(path.read_text(encoding="utf-8"))
    right, wrong = ([RowLoss(*row) for row in measured[key]] for key in ("losses", "losses_with_other_answers"))
    both = measured["gradient_norms"], measured["gradient_norms_with_other_answers"]
    counts = look_at([row_facts(n, r["input_ids"], r["labels"]) for n, r in enumerate(clean)], LENGTH, [])
    named = [*counts.findings, *standing_out(right)[0]]
    judged = {
        "named_of_clean_data": [(finding.row, finding.reason) for finding in named],
        **mean_of([planted(clean, right, wrong, both, random.Random(draw)) for draw in range(DRAWS)]),
    }
    write(path, {**measured, **judged})
    print(json.dumps(judged))


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")


def with_other_answers(rows: Sequence[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    """Every row with the answer of another one, each answer once."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    follows = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [{**row, answer: rows[follows[number]][answer]} for number, row in enumerate(rows)]


def tokenized(rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[Row]:
    found = TokenizedRows(rows, tokenizer, LENGTH)
    return [found[number] for number in range(len(rows))]


def losses(base: Any, rows: Sequence[Row], device: torch.device) -> list[RowLoss]:
    task = find_task(base)
    assert isinstance(task, LanguageModel)
    facts = [row_facts(number, row["input_ids"], row["labels"]) for number, row in enumerate(rows)]
    return row_losses(task, rows, facts, device, show_progress=True)


def gradient_norms(base: Any, rows: Sequence[Row], device: torch.device) -> list[float]:
    """The gradient of each row by itself, as an initialisation has it of the rows that it estimates on."""
    task, found = find_task(base.requires_grad_(False)), []
    told = partial(LossPass, 1.0, None, lambda _: nullcontext(), lambda _n, _weights: nullcontext())
    with reading_mode(base), torch.enable_grad():
        for row in tqdm(rows, desc="the gradient of every row"):
            batch = task.read(collate([row]), 1)
            task.backward(batch, task.inputs(batch, device), told(gradient_norms=lambda of: found.append(of.item())))
    return found


def planted(
    clean: Sequence[Row],
    right: Sequence[RowLoss],
    wrong: Sequence[RowLoss],
    norms: tuple[Sequence[float], Sequence[float]],
    chance: random.Random,
) -> dict[str, float]:
    """Plant faults at random; what was found of them."""
    order = list(range(len(clean)))
    chance.shuffle(order)
    n_other, n_repeated, n_masked = (round(share * len(clean)) for share in (OTHER_ANSWERS, REPEATED, MASKED))
    other, repeated = set(order[:n_other]), order[n_other:][:n_repeated]
    masked = order[n_other + n_repeated :][:n_masked]
    rows = [dict(row) for row in clean]
    for row, of in zip(repeated, order[-n_repeated:], strict=True):
        rows[row] = rows[of]
    for row in masked:
        rows[row]["labels"] = [-100] * len(rows[row]["labels"])
    read = [row_facts(n, row["input_ids"], row["labels"]) for n, row in enumerate(rows)]
    facts = look_at(read, LENGTH, [])
    again = set(facts.rows_by("duplicate"))
    out = {*repeated, *masked, *again}
    judged = [(wrong if n in other else right)[n] for n in range(len(clean)) if n not in out]
    of_row = {row.row: norms[row.row in other][row.row] for row in judged}
    large = {finding.row for finding in with_large_gradients(read, of_row)[0]}
    named = {finding.row for finding in standing_out(judged)[0]}
    exact = len(again) == n_repeated and facts.rows_by("masked") == sorted(masked)

    def precision(figure: Callable[[RowLoss], float]) -> float:
        return len(other & {row.row for row in sorted(judged, key=figure)[:n_other]}) / n_other

    return {
        "counts_exact": float(exact),
        "precision_by_loss": precision(lambda row: -row.mean),
        "precision_by_gradient": precision(lambda row: -of_row[row.row]),
        "precision_by_help": precision(lambda row: row.help or 0.0),
        "named_of_other_answers": len(named & other) / n_other,
        "named_of_clean": len(named - other) / (len(judged) - n_other),
        "named_by_gradient_of_other_answers": len(large & other) / n_other,
        "named_by_gradient_of_clean": len(large - other) / (len(judged) - n_other),
    }


def mean_of(draws: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(draw[key] for draw in draws) / len(draws) for key in draws[0]}


if __name__ == "__main__":
    run(main)
