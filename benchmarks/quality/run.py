"""One cell: a TRL QLoRA run from one start."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.errors import BenchmarkError
from benchmarks.measure import measured
from benchmarks.qlora import lora_config
from benchmarks.quality.analysis import PLAIN, Conditions
from benchmarks.quality.base import load_base
from benchmarks.quality.corpora import Corpus, SeedRows, split_rows, spread
from benchmarks.quality.exact_match import exact_match
from benchmarks.quality.heldout import Heldout, find_choice
from benchmarks.quality.movement import Figures, Movement
from benchmarks.quality.neighbours import OWN_BASE, eva, on_its_own_base
from benchmarks.quality.prediction import best_first_step
from benchmarks.quality.results import ADAPTERS, Cell, Result, has_diverged
from benchmarks.quality.starts import A_TIMES, FROZEN_A, UNCLIPPED, freeze_A, matches_rate, ours, scale_A
from benchmarks.tokenized_rows import Row
from lora_da import InitReport
from lora_da.memory import GIB
from lora_da.samples.rows import collate

DTYPES = dict(zip(ADAPTERS, (torch.float32, torch.bfloat16), strict=True))
EVALUATIONS = 20  # over a run, and one before it
WARMUP = 0.1  # of the steps
CLIPPED_AT = 1.0  # norm of all gradients, as transformers and Axolotl have it
MOVED_AT = (0.25, 0.5, 0.75, 1.0)  # shares of the steps after which the adapter's movement is looked at
PREDICTED_FROM = 32  # rows that the first step is looked at on


@dataclass
class Curve:
    """What was seen of a run."""

    train_loss: list[float]
    heldout: list[tuple[int, float]]
    full: list[tuple[int, float]]
    step_seconds: list[float]
    movement: list[tuple[int, Figures]]


class _Observer(TrainerCallback):
    """Writes the curves down. The model is looked at without a trace: no gradient, no mode, no random number.

    Args:
        some: rows that are looked at before the first step and at even distances.
        all_rows: those that are looked at after the cell's shares of the steps.
    """

    def __init__(self, some: Heldout, all_rows: Heldout, cell: Cell) -> None:
        self.curve = Curve([], [], [], [], [])
        self._some, self._all, self._cell = some, all_rows, cell
        self._every = max(1, cell.steps // EVALUATIONS)
        self._full_at = {round(share * cell.steps) for share in cell.full_at}
        self._moved_at = {round(share * cell.steps) for share in MOVED_AT}
        self._movement: Movement | None = None
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, _control: Any, model: PeftModel, **_: Any) -> None:
        check_adapters(model, self._cell.adapters)
        self._movement = Movement(model)
        self._look(0, model)

    def on_step_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, _control: Any, model: PeftModel, **_: Any) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        self.curve.step_seconds.append(time.perf_counter() - self._began)
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._look(state.global_step, model)
        if state.global_step in self._full_at:
            self.curve.full.append((state.global_step, self._all.measure(model.get_base_model())[0]))
        if state.global_step in self._moved_at:
            assert self._movement is not None
            self.curve.movement.append((state.global_step, self._movement.figures()))

    def on_log(self, args: Any, state: Any, _control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.curve.train_loss.append(float(logs["loss"]))

    def _look(self, step: int, model: PeftModel) -> None:
        self.curve.heldout.append((step, self._some.measure(model.get_base_model())[0]))


class Runner:
    """Runs cells on one base model, one after the other.

    Args:
        name, base: of the base, see `load_base`; a cell leaves it as it was.
        cache: a folder for solutions.
    """

    def __init__(self, name: str, base: str, device: torch.device, cache: Path | None = None) -> None:
        self._name, self._base, self._device, self._cache = name, base, device, cache
        self._model, self._tokenizer = load_base(name, base, device)
        self._predictions: dict[Cell, float | None] = {}  # of cells at a rate of zero, where they hold at any
        self._base_losses: dict[Conditions, float] = {}

    def run(self, cell: Cell, corpus: Corpus, environment: Mapping[str, Any], predict: bool) -> Result:
        """Train one cell.

        Args:
            corpus: its task's.
            environment: what it is run on, as `Result` has it.
            predict: whether the start is asked for its learning rate first.

        Raises:
            BenchmarkError: the trainer holds the adapters in another dtype than the cell's.
        """
        rows = split_rows(
            corpus, self._tokenizer, cell.split, cell.length, cell.heldout_rows, cell.steps * cell.batch, cell.seed
        )
        heldout = Heldout(rows.heldout, find_choice(corpus, self._tokenizer), self._device)
        base_loss = self._base_loss(heldout, cell)
        start = self._start(rows, cell)
        torch.manual_seed(cell.seed)  # of random factors
        (model, report), init = measured(start, self._device)
        try:
            prediction = self._prediction(model, rows, cell) if predict else None
            some = Heldout(spread(rows.heldout, cell.curve_rows), None, self._device)
            curve, train = measured(lambda: train_cell(model, rows, some, heldout, cell), self._device)
            final, ranked_right = heldout.measure(model.get_base_model())
            exact = self._exact_match(model, rows, cell)
        finally:
            model.unload()
        accuracy = None
        if ranked_right is not None and heldout.majority is not None:
            accuracy = {"heldout": ranked_right, "majority": heldout.majority}
        return Result(
            cell=cell,
            train_loss=curve.train_loss,
            heldout=curve.heldout,
            final=final,
            base_loss=base_loss,
            accuracy=accuracy,
            diverged=has_diverged(curve.train_loss, curve.heldout, final, base_loss),
            own_base=cell.method in OWN_BASE,
            init_seconds=init.seconds,
            train_seconds=train.seconds,
            from_cache=report is not None and report.from_cache,
            peak_memory_gib=max(cost.gpu_peak or cost.cpu_peak for cost in (init, train)) / GIB,
            memory_of="process" if train.gpu_peak is None else "GPU",
            initialized=None if report is None else report.initialized,
            prediction=prediction,
            environment=environment,
            full=[*curve.full, (cell.steps, final)],
            step_seconds=median(curve.step_seconds),
            exact_match=exact,
            movement=curve.movement,
        )

    def _base_loss(self, heldout: Heldout, cell: Cell) -> float:
        """Measure the untouched base, once for all cells under the same conditions."""
        conditions = Conditions.of(cell)
        if conditions not in self._base_losses:
            self._base_losses[conditions] = heldout.measure(self._model)[0]
        return self._base_losses[conditions]

    def _exact_match(self, model: PeftModel, rows: SeedRows, cell: Cell) -> float | None:
        if not cell.exact_match_rows:
            return None
        return exact_match(model.get_base_model(), self._tokenizer, spread(rows.heldout, cell.exact_match_rows))

    def _prediction(self, model: PeftModel, rows: SeedRows, cell: Cell) -> float | None:
        same_start = cell if matches_rate(cell) else replace(cell, rate=0.0)
        if same_start not in self._predictions:
            looked_at = rows.train[: min(cell.init_samples, PREDICTED_FROM)]
            self._predictions[same_start] = best_first_step(model, looked_at, cell.batch)
        return self._predictions[same_start]

    def _start(self, rows: SeedRows, cell: Cell) -> Callable[[], tuple[PeftModel, InitReport | None]]:
        """Return what starts the adapter: it gives the model, and the report where that is our own doing. Another model
        that this takes is loaded before."""
        samples = rows.train[: cell.init_samples]
        if cell.method in OWN_BASE:
            dense = load_base(self._name, "bf16", self._device)[0]
            return lambda: (on_its_own_base(dense, cell, _loader(samples, 1), self._device), None)
        if cell.method == "eva":
            fresh = load_base(self._name, self._base, self._device)[0]
            return lambda: (eva(self._model, fresh, cell, _loader(samples, cell.batch)), None)

        loader = _loader(rows.train, cell.batch)

        def start() -> tuple[PeftModel, InitReport | None]:
            model = get_peft_model(self._model, lora_config(cell.rank, cell.alpha_over_r))
            report = None if cell.method == PLAIN else ours(model, loader, cell, self._cache)
            if A_TIMES in cell.settings:
                scale_A(model, cell.settings[A_TIMES])
            if cell.settings.get(FROZEN_A):
                freeze_A(model)
            return model, report

        return start


def _loader(rows: Sequence[Row], batch: int) -> DataLoader[Any]:
    return DataLoader(rows, batch, collate_fn=collate)  # type: ignore[arg-type]


def train_cell(model: PeftModel, rows: SeedRows, some: Heldout, all_rows: Heldout, cell: Cell) -> Curve:
    """Train with TRL, on the rows in their order, the adapters in the cell's dtype.

    TRL casts the adapters of a 4-bit base to bf16 when the trainer is made, and leaves those of any other base in the
    float32 that PEFT gives them. So the start is put back then, in the dtype that is asked for.
    """
    observer = _Observer(some, all_rows, cell)
    adapter = adapter_parameters(model)
    started = [p.detach().clone() for p in adapter]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=training_arguments(cell, folder, model),
            train_dataset=Dataset.from_list(rows.train),
            data_collator=collate,
            callbacks=[observer],
        )
        for p, start in zip(adapter, started, strict=True):
            p.data = start.to(DTYPES[cell.adapters])
        trainer.train()
    check_adapters(model, cell.adapters)
    return observer.curve


def adapter_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    """List lora_A and lora_B of every layer, frozen or not."""
    return [p for name, p in model.named_parameters() if "lora_" in name]


def check_adapters(model: PeftModel, adapters: str) -> None:
    """Refuse an adapter of another dtype.

    Raises:
        BenchmarkError: one is.
    """
    found = {p.dtype for p in adapter_parameters(model)}
    if found != {DTYPES[adapters]}:
        raise BenchmarkError(f"adapters are trained in {', '.join(map(str, found))}; the cell asks for {adapters}")


def training_arguments(cell: Cell, folder: str, model: PeftModel) -> SFTConfig:
    """Write down the recipe that all cells share."""
    on_gpu = model.device.type == "cuda"
    return SFTConfig(
        output_dir=folder,
        max_steps=cell.steps,
        per_device_train_batch_size=cell.batch,
        learning_rate=cell.rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(WARMUP * cell.steps),
        max_grad_norm=0.0 if cell.settings.get(UNCLIPPED) else CLIPPED_AT,
        seed=cell.seed,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        gradient_checkpointing=False,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
