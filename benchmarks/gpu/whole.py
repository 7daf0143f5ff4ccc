"""A whole Llama of the 8B's shape, nf4, random weights, on a card of so many GB: an initialisation beside a training
step and a checkpointed pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel

from benchmarks.floor import counted, plain_pass, training_step
from benchmarks.gpu.parts import MISSED, Figures, NotRun, Part, Place
from benchmarks.measure import Cost, measured, release_memory
from benchmarks.ours import adapter_kept, init_batches
from benchmarks.subjects import SUBJECTS, Subject, with_lora
from lora_da import InitReport, LoraDAConfig, initialize_lora_da_weights
from lora_da.first_step import DOCUMENTS
from lora_da.memory import GIB, is_out_of_memory

SAMPLES = 256
PASS_SAMPLES = 64  # that the checkpointed pass reads: its time is compared by the token
STEP_TOKENS = 2048
# What a card's processes hold outside of torch's allocator, which alone knows the cap: CUDA's context, a desktop.
OUTSIDE = 0.75  # GiB


def parts(place: Place, cap: int, length: int) -> list[Part]:
    case = Case(place, cap, 16 if place.toy else length)
    return [
        Part("initialisation", case.initialise),
        Part(f"training step 1 × {case.step_tokens}", case.step),
        Part("checkpointed pass", case.plain),
    ]


@dataclass
class Case:
    """One cap and one length of rows; the model is built when it is first asked for."""

    place: Place
    cap: int
    length: int

    @property
    def step_tokens(self) -> int:
        return 32 if self.place.toy else STEP_TOKENS

    @cached_property
    def subject(self) -> Subject:
        if self.place.toy:
            return SUBJECTS["tiny"].resized(8 + DOCUMENTS, self.length, 4)
        return SUBJECTS["llama-3.1-8b"].resized(SAMPLES + DOCUMENTS, self.length, 8)

    @cached_property
    def model(self) -> PeftModel:
        self.put_under_cap()
        return with_lora(self.subject.build("nf4", self.place.device))

    def put_under_cap(self) -> None:
        """Leave torch what a card of so many GB would.

        Raises:
            NotRun: this card is smaller.
        """
        if not self.place.on_gpu or self.place.toy:
            return
        total = torch.cuda.get_device_properties(self.place.device).total_memory
        allowed = (self.cap - OUTSIDE) * GIB
        if allowed > total:
            raise NotRun(f"no card of {self.cap} GB")
        torch.cuda.set_per_process_memory_fraction(allowed / total, self.place.device)

    def initialise(self) -> Figures:
        model, loader = self.model, self.subject.loader()
        config = LoraDAConfig(samples=self.subject.samples - DOCUMENTS)

        def ours() -> InitReport:
            return initialize_lora_da_weights(model, loader, config, show_progress=False)

        with adapter_kept(model):
            report, cost = measured(ours, self.place.device)
        figures = self._figures(cost, report.tokens)
        figures |= {"forecast_gib": report.forecast["device"] / GIB, "plan": report.plan}
        figures |= {f"{name.replace(' ', '_')}_seconds": seconds for name, seconds in report.timings.items()}
        if report.failed:
            figures[MISSED] = f"{len(report.failed)} of {report.targeted} layers have no start"
        return {**figures, "failed": report.failed, "notes": report.notes}

    def step(self) -> Figures:
        model, device = self.model, self.place.device
        with adapter_kept(model):
            return self._if_it_fits(lambda: training_step(model, 1, self.step_tokens, device), self.step_tokens)

    def plain(self) -> Figures:
        model = self.model
        batches = init_batches(self.subject.loader(), min(PASS_SAMPLES, self.subject.samples), self.place.device)
        return self._if_it_fits(lambda: plain_pass(model, batches), sum(counted(batches)))

    def _if_it_fits(self, work: Any, tokens: int) -> Figures:
        """Measure it; that it takes more memory than there is, is a finding too."""
        try:
            return self._figures(measured(work, self.place.device)[1], tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0]
        release_memory()
        return {"out_of_memory": message}

    def _figures(self, cost: Cost, tokens: int) -> Figures:
        peak = cost.cpu_peak if cost.gpu_peak is None else cost.gpu_peak
        each = {"tokens": tokens, "per_1000_tokens_seconds": 1000 * cost.seconds / tokens}
        return {"seconds": cost.seconds, "peak_gib": peak / GIB, "host_increase_gib": cost.cpu_increase / GIB, **each}
