"""What an initialisation did, for people (one line) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_da.findings import DataReport

REPORT_FILE = "lora_da_report.json"
NAMED = 5  # of many layers: experts may be hundreds


@dataclass(frozen=True)
class LayerReport:
    """One initialised layer.

    Args:
        rank: r.
        tokens: tokens its statistics were taken over.
        bias_captured: share of the bias term that the chosen subspace holds, 0 to 1; of ‖G‖²_F in `lora_one` and
            `lora_ga`. None, as in the next ones, where the method has no such figure.
        damping_input, damping_output: what was added to the diagonals of Z and Y.
        full_fisher: whether Y was estimated in full, and not as its diagonal or not at all.
        condition: estimated condition number of the damped Z.
        residual: of the eigenpairs, relative to the largest eigenvalue.
        relative_step: ‖s·BA‖_F / ‖W‖_F as written; None where the base's format gives no W.
        fisher_length: of s·BA as written, in the damped Fisher of the estimate: half its square is how far K-FAC
            expects this layer's step to move the predictions.
    """

    rank: int
    tokens: int
    bias_captured: float | None
    damping_input: float | None
    damping_output: float | None
    full_fisher: bool
    condition: float | None
    residual: float | None
    relative_step: float | None
    fisher_length: float | None


@dataclass(frozen=True)
class FirstStepReport:
    """How far along lora_B·lora_A training starts, where that was measured. Losses are means per loss token.

    Args:
        documents: that were looked at, none of which the estimate has seen.
        loss_before: at the base; loss_after: at the length that was chosen.
        length: root mean square, over the layers, of the spectral norm of s·lora_B·lora_A; 0 where none lowered the
            loss.
        tried: (length, loss), ascending.
        seconds: wall time.
    """

    documents: int
    loss_before: float
    loss_after: float
    length: float
    tried: list[tuple[float, float]]
    seconds: float

    def line(self) -> str:
        """What a user sees."""
        documents = "document" if self.documents == 1 else "documents"
        found = f"LoRA-DA: loss on {self.documents} other {documents} {self.loss_before:.3f}"
        if self.length:
            return f"{found} → {self.loss_after:.3f} before the first step"
        return f"{found}, which no first step lowers: lora_B is zero, and training starts at the base"


@dataclass(frozen=True)
class RateReport:
    """How lora_A was enlarged for the trainer's learning rate.

    Args:
        learning_rate: the trainer's.
        of_first_step: at which Adam's first step in lora_B would be as long as the first step that was measured.
        times: what lora_A was multiplied and lora_B divided by; 1 where the learning rate is large enough.
    """

    learning_rate: float
    of_first_step: float
    times: int

    def words(self) -> str | None:
        """What a user sees, behind the first step; nothing where nothing was done."""
        return None if self.times == 1 else f"lora_A × {self.times} for a learning rate of {self.learning_rate:g}"


@dataclass(frozen=True)
class InitReport:
    """One initialisation. `skipped` says why nothing was done, and is None where something was.

    Args:
        initialized, targeted: layers started from data, layers the adapter targets.
        failed: layers that keep PEFT's init because of their statistics (name → why).
        left: layers that keep PEFT's init because of their kind (name → why).
        samples, tokens, loss_tokens: counted documents and tokens. sample_unit: what a sample is.
        population_size: N, in samples; None where it is neither known nor needed.
        loss: mean loss over the init samples at the untouched base model, per loss token.
        gradient_norms: (row, mean over its loss tokens of the norm of the loss's gradient in what the language-model
            head reads), at the same model, of samples that are rows.
        seconds: wall time; steps: how many training steps that is, by the time that the forward and backward of a token
            took; None where the rows of a step are not known, as outside a trainer. peak_memory_gib: peak during it,
            of `memory_of`.
        plan: how the samples were run through the model, with the memory that was forecast.
        forecast: bytes planned with: `device` (used before, and beside that), `cpu` (hidden states at borders).
        timings: seconds by what they were spent on.
        from_cache: the factors were solved by an earlier run, which loss, plan, forecast and timings are of.
        settings: method, preset and numbers used.
        layers: per initialised layer.
        first_step: what was measured of it; None where it was not.
        rate: what was done for the trainer's learning rate; None without `match_rate`, a rate or a measured step.
        data: what the rows told that were read for it; None where it has read none.
        notes: sentences on what training does otherwise than the estimate.
    """

    initialized: int = 0
    targeted: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    samples: int = 0
    sample_unit: str = "row"
    tokens: int = 0
    loss_tokens: int = 0
    population_size: int | None = 0
    loss: float | None = None
    gradient_norms: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    steps: float | None = None
    peak_memory_gib: float = 0.0
    memory_of: str = ""
    plan: str = ""
    forecast: dict[str, int] = dataclasses.field(default_factory=dict)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: dict[str, LayerReport] = dataclasses.field(default_factory=dict)
    first_step: FirstStepReport | None = None
    rate: RateReport | None = None
    data: DataReport | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    skipped: str | None = None
    from_cache: bool = False

    def taking(self, seconds: float, step_tokens: float) -> InitReport:
        """The report of what took this long.

        Args:
            seconds: wall time.
            step_tokens: tokens of a training step, of all processes that the samples were shared over; 0 where they are
                not known.
        """
        step_seconds = step_tokens * self.token_seconds
        return dataclasses.replace(self, seconds=seconds, steps=seconds / step_seconds if step_seconds else None)

    @property
    def token_seconds(self) -> float:
        """Seconds of the forward and backward of a token in this process; 0 where there was no backward."""
        if "backward" not in self.timings or not self.tokens:
            return 0.0
        return sum(self.timings.get(part, 0.0) for part in ("forward", "head", "backward")) / self.tokens

    def line(self) -> str:
        """What a user sees: one line, and one more each where the first step was measured, and where the data are to be
        looked at."""
        if self.skipped is not None:
            return f"LoRA-DA: left the adapter as it is: {self.skipped}"
        failed = f" (kept PEFT's init: {listed(list(self.failed))})" if self.failed else ""
        steps = "" if self.steps is None else f" ({self.steps:.1f} training steps)"
        method = self.settings.get("method", "lora_da")
        other = "" if method == "lora_da" else f" by {method}"
        done = (
            f"LoRA-DA: initialised {self.initialized} of {self.targeted} layers{other}{failed} "
            f"from {self.samples} samples, {self.tokens:,} tokens in {self.seconds:.1f} s{steps}, "
            f"peak {self.memory_of} memory {self.peak_memory_gib:.1f} GiB; "
            f"{'from the cache' if self.from_cache else self.plan}"
        )
        found = None if self.data is None else self.data.line()
        return "\n".join(filter(None, (done, self._start_line(), found)))

    def _start_line(self) -> str | None:
        """How far along the first step, and what was done for the learning rate."""
        if self.first_step is None:
            return None
        words = None if self.rate is None else self.rate.words()
        if self.rate is None and self.first_step.length and self.settings.get("match_rate"):
            words = "lora_A as it is, for no learning rate of Adam or its kin is known"
        return "; ".join(filter(None, (self.first_step.line(), words)))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the report as JSON beside the adapter."""
        path = Path(folder) / REPORT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        return path


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
