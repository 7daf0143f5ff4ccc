"""The entries of the table of costs: each prepares what it needs, then has its work measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import published
from benchmarks.errors import BenchmarkError
from benchmarks.floor import Products, counted, plain_pass, targeted_shapes, training_step
from benchmarks.measure import Cost, measured
from benchmarks.neighbours import Eva, LoraGA
from benchmarks.ours import adapter_kept, init_batches, ours
from benchmarks.subjects import Subject, with_lora

PLAIN_PASS, PRODUCTS, PUBLISHED, EVA, LORA_GA = "plain pass", "products alone", "published", "EVA", "LoRA-GA"
ONE_PASS = "ours, one pass"

Outcome = tuple[dict[str, Any], Cost]


def streamed(segments: int) -> str:
    """Name the entry of ours in so many segments."""
    return f"ours, streamed in {segments}"


def step(rows: int, length: int) -> str:
    """Name the entry of one training step."""
    return f"training step {rows} × {length}"


@dataclass(frozen=True)
class Entry:
    """One line of the table, `row` in the JSON. `run` measures it on a prepared model."""

    name: str
    base: str
    run: Callable[[Prepared], Outcome]


class Prepared:
    """A freshly built model with its adapter, the samples as each entry wants them, and all one-time costs paid."""

    def __init__(self, subject: Subject, base: str, device: torch.device) -> None:
        self.subject, self.device = subject, device
        self.rows, self.loader = subject.rows(), subject.loader()
        self.peft_model = with_lora(subject.build(base, device))
        self.batches = init_batches(self.loader, subject.samples, device)
        plain_pass(self.peft_model, self.batches[:1])

    def data(self) -> dict[str, Any]:
        """Count what was read."""
        tokens = [tokens for _, tokens in self.batches]
        return {
            "samples": sum(t.n_documents for t in tokens),
            "tokens": sum(int((t.document >= 0).sum()) for t in tokens),
            "loss_tokens": sum(int(t.loss_tokens.sum()) for t in tokens),
            "batches": [list(batch["input_ids"].shape) for batch, _ in self.batches],
            "dtype": str(next(self.peft_model.get_base_model().get_input_embeddings().parameters()).dtype),
        }


def all_entries(subject: Subject, device: torch.device, segments: Sequence[int], judged: str) -> list[Entry]:
    """List every entry in the order they run in on one model; EVA and LoRA-GA leave theirs changed and come last.

    Args:
        judged: the entry of ours that the targets are judged on; it runs on bf16 too.

    Raises:
        BenchmarkError: there is no such entry of ours.
    """
    plans: dict[str, int | None] = {ONE_PASS: None, **{streamed(count): count for count in segments}}
    if judged not in plans:
        raise BenchmarkError(f"--judge is {judged!r}; set one of {', '.join(map(repr, plans))}")
    steps = [(1, subject.length), (4, subject.length)]
    if device.type == "cuda" and subject.length < 2048:
        steps.append((1, 2048))
    return [
        Entry(PLAIN_PASS, "nf4", _plain_pass),
        Entry(PRODUCTS, "nf4", _products),
        *(Entry(name, "nf4", _ours(plan)) for name, plan in plans.items()),
        *(Entry(step(*size), "nf4", _training_step(*size)) for size in steps),
        Entry(EVA, "nf4", _eva),
        Entry(judged, "bf16", _ours(plans[judged])),
        Entry(PUBLISHED, "bf16", _published),
        Entry(LORA_GA, "bf16", _lora_ga),
    ]


def _plain_pass(prepared: Prepared) -> Outcome:
    _, cost = measured(lambda: plain_pass(prepared.peft_model, prepared.batches), prepared.device)
    return {}, cost


def _products(prepared: Prepared) -> Outcome:
    shapes = targeted_shapes(prepared.peft_model, prepared.device)
    products = Products(shapes, counted(prepared.batches), prepared.device)
    _, cost = measured(products.run, prepared.device)
    listed = {
        "inputs": [[i, count] for i, count in shapes.inputs.items()],
        "layers": [[o, i, count] for (o, i), count in shapes.layers.items()],
    }
    return {"tokens": products.tokens, **listed}, cost


def _ours(segments: int | None) -> Callable[[Prepared], Outcome]:
    def run(prepared: Prepared) -> Outcome:
        with adapter_kept(prepared.peft_model):
            report, cost = measured(
                lambda: ours(prepared.peft_model, prepared.loader, prepared.subject.samples, segments), prepared.device
            )
        details = {name: getattr(report, name, None) for name in ("seconds", "timings", "plan", "forecast", "passes")}
        details |= {name: getattr(report, name) for name in ("initialized", "targeted", "samples", "tokens")}
        return details, cost

    return run


def _training_step(rows: int, length: int) -> Callable[[Prepared], Outcome]:
    def run(prepared: Prepared) -> Outcome:
        model, device = prepared.peft_model, prepared.device
        with adapter_kept(model):
            _, cost = measured(lambda: training_step(model, rows, length, device), device)
        return {}, cost

    return run


def _published(prepared: Prepared) -> Outcome:
    model, rows, device = prepared.peft_model, prepared.rows, prepared.device
    return measured(lambda: published.published(model, rows, device), device)


def _eva(prepared: Prepared) -> Outcome:
    eva = Eva(prepared.peft_model)
    return measured(lambda: eva.run(prepared.loader), prepared.device)


def _lora_ga(prepared: Prepared) -> Outcome:
    lora_ga = LoraGA(prepared.peft_model)
    return measured(lambda: lora_ga.run(prepared.loader, prepared.device), prepared.device)
