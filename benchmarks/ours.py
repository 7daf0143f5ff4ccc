"""LoRA-DA as this project does it, in the plan that an entry asks for, and the batches it reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from lora_da import InitReport, LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.collect import collect
from lora_da.collect.plan import in_segments
from lora_da.methods import METHODS
from lora_da.model.sharding import compute_device
from lora_da.model.state import drawing_mode, estimation_mode
from lora_da.processes import Processes, Run
from lora_da.samples.draw import Size, draw, read_causal
from lora_da.samples.tokens import BatchTokens
from lora_da.tasks import find_task

Batches = list[tuple[dict[str, Tensor], BatchTokens]]


def ours(peft_model: PeftModel, loader: DataLoader[Any], samples: int, segments: int | None) -> InitReport:
    """Initialise the adapter from the first `samples` samples.

    Args:
        segments: stream the decoder in so many segments; None for one ordinary pass.
    """
    config, plan = LoraDAConfig(samples=samples), in_segments(segments or 1)
    return initialize_lora_da_weights(peft_model, loader, config, show_progress=False, plan=plan)


def border_bytes(peft_model: PeftModel, loader: DataLoader[Any], samples: int, segments: int | None) -> int:
    """Run what `ours` runs but for the solving; the most bytes that borders hold of hidden states and gradients."""
    task, method = find_task(peft_model.get_base_model()), METHODS["lora_da"]
    run = Run(Processes(), compute_device(task.model, task.blocks), None, False)
    needs = method.needs_with(method.presets["default"])
    with drawing_mode():
        data = draw(loader, Size(samples), None, None, task.read, method.population)
    with estimation_mode(peft_model):
        layers, plan = find_adapter(peft_model).layers, in_segments(segments or 1)
        return collect(task, layers, data, needs, run, lambda layer, observed: None, plan).border_bytes


def init_batches(loader: DataLoader[Any], samples: int, device: torch.device) -> Batches:
    """The batches that `ours` reads, as the decoder takes them, on the device, with their counted tokens."""
    drawn = draw(loader, Size(samples), None, None, read_causal, True).batches
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
