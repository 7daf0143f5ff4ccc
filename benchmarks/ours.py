"""LoRA-DA as this project does it, in the plan that a row asks for, and the batches it reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from lora_da import InitReport, LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import AdapterLayer
from lora_da.data import draw
from lora_da.plan import Plan, cut, make_plan
from lora_da.survey import Survey
from lora_da.tokens import BatchTokens

Batches = list[tuple[dict[str, Tensor], BatchTokens]]


def ours(peft_model: PeftModel, loader: DataLoader[Any], samples: int, segments: int | None) -> InitReport:
    """Initialise the adapter from the first `samples` samples.

    Args:
        segments: stream the decoder in so many segments; None for one ordinary pass.
    """
    with _forced_plan(segments):
        return initialize_lora_da_weights(peft_model, loader, LoraDAConfig(samples=samples), show_progress=False)


@contextlib.contextmanager
def _forced_plan(segments: int | None) -> Iterator[None]:
    """The planner's choice replaced while the context is open."""

    def forced(survey: Survey, layers: Sequence[AdapterLayer], *others: Any) -> Plan:
        return replace(make_plan(survey, layers, *others), segments=tuple(cut(survey, layers, segments or 1)))

    with mock.patch("lora_da.initialize.make_plan", forced):
        yield


def init_batches(loader: DataLoader[Any], samples: int, device: torch.device) -> Batches:
    """The batches that `ours` reads, as the decoder takes them, on the device, with their counted tokens."""
    drawn = draw(loader, samples, None, None).batches
    return [({k: v.to(device) for k, v in b.inputs.items() if k != "labels"}, b.tokens) for b in drawn]


@contextlib.contextmanager
def adapter_kept(peft_model: PeftModel) -> Iterator[None]:
    """The adapter's weights put back, and its gradients dropped, when the context is left."""
    adapter = [(p, p.detach().clone()) for name, p in peft_model.named_parameters() if "lora_" in name]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in adapter:
                parameter.copy_(before)
                parameter.grad = None
