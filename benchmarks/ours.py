"""LoRA-DA as this project does it, in the plan that an entry asks for, and the batches it reads."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from lora_da import InitReport, LoraDAConfig, initialize_lora_da_weights
from lora_da.collect.borders import Border
from lora_da.collect.plan import make_plan
from lora_da.samples.draw import draw
from lora_da.samples.tokens import BatchTokens

Batches = list[tuple[dict[str, Tensor], BatchTokens]]


def ours(peft_model: PeftModel, loader: DataLoader[Any], samples: int, segments: int | None) -> InitReport:
    """Initialise the adapter from the first `samples` samples.

    Args:
        segments: stream the decoder in so many segments; None for one ordinary pass.
    """
    with mock.patch("lora_da.initialize.make_plan", partial(make_plan, n_segments=segments or 1)):
        return initialize_lora_da_weights(peft_model, loader, LoraDAConfig(samples=samples), show_progress=False)


@contextlib.contextmanager
def border_bytes() -> Iterator[list[int]]:
    """A list that is given, each time a hidden state or gradient is kept at a border, the bytes then kept at all."""
    borders: weakref.WeakSet[Border] = weakref.WeakSet()
    seen = [0]
    original = Border.put

    def put(border: Border, number: int, tensor: Tensor) -> None:
        original(border, number, tensor)
        borders.add(border)
        seen.append(sum(border.nbytes for border in borders))

    with mock.patch.object(Border, "put", put):
        yield seen


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
