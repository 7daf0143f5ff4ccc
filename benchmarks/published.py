"""The published procedure as a user of the authors' code would run it, without its solve.

One pass for the full gradient of every targeted weight, then the Fisher in groups of eight decoder layers, one pass
over all samples each; single-sample batches, float32 products, on an unquantised model with gradient checkpointing.
Where the description leaves a choice, the cheaper one is taken: layers that read the same tensor share one xᵀx, no
weight takes a gradient in the Fisher passes, and the host never waits for the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.floor import require_gradient
from benchmarks.tokenized_rows import Row
from lora_da.adapter import find_adapter
from lora_da.samples.rows import collate

GROUP = 8  # decoder layers whose Fisher is taken in one pass
PROFILED_SAMPLES = 4
PROFILED_OPERATIONS = 30


def published(peft_model: PeftModel, rows: Sequence[Row], device: torch.device) -> dict[str, Any]:
    """Gradients and Fishers of all targeted layers of an unquantised model: its passes and the seconds of each part."""
    started = time.perf_counter()
    gradients = full_gradient(peft_model, rows, device)
    _wait(device)
    seconds = {"gradient": time.perf_counter() - started}
    started = time.perf_counter()
    groups = layer_groups(peft_model)
    for group in groups:
        group_fisher(peft_model, group, rows, device)
    _wait(device)
    seconds["fisher"] = time.perf_counter() - started
    held = sum(gradient.nbytes for gradient in gradients.values())
    return {"timings": seconds, "passes": 1 + len(groups), "gradient_bytes": held}


def full_gradient(peft_model: PeftModel, rows: Iterable[Row], device: torch.device) -> dict[str, Tensor]:
    """(o, i) of each targeted weight, summed over the samples in float32."""
    weights = {layer.name: layer.base.get_parameter("weight") for layer in find_adapter(peft_model).layers}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}

    def gather(name: str) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                sums[name] += gradient

        return add

    with _frozen_but(peft_model, weights.values()):
        hooks = [weight.register_post_accumulate_grad_hook(gather(name)) for name, weight in weights.items()]
        with _removed(hooks):
            _backward_each(peft_model, rows, device)
    return sums


def layer_groups(peft_model: PeftModel) -> list[dict[str, nn.Module]]:
    """The targeted base layers, by name, of each eight decoder layers."""
    layers = find_adapter(peft_model).layers
    blocks = peft_model.get_base_model().get_decoder().layers
    groups = []
    for first in range(0, len(blocks), GROUP):
        within = {id(module) for block in blocks[first : first + GROUP] for module in block.modules()}
        groups.append({layer.name: layer.base for layer in layers if id(layer.base) in within})
    return groups


def group_fisher(
    peft_model: PeftModel, group: dict[str, nn.Module], rows: Iterable[Row], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Σ x xᵀ (i, i) by the first layer that reads x, and the diagonal of Σ d dᵀ (o,) by layer, in float32."""
    covariances: dict[str, Tensor] = {}
    fishers: dict[str, Tensor] = {}
    last: Any = None

    def watch(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            nonlocal last
            x = args[0]
            reads_first = x is not last
            last = x

            def add(d: Tensor) -> None:  # of the graph that is really backpropagated through: once a sample
                if reads_first:
                    flat = x.detach().flatten(0, -2).float()
                    covariances[name] = covariances.get(name, 0) + flat.T @ flat
                fishers[name] = fishers.get(name, 0) + d.flatten(0, -2).float().square().sum(0)

            output.register_hook(add)

        return observe

    embeddings = peft_model.get_base_model().get_input_embeddings()
    with _frozen_but(peft_model, ()):
        hooks = [module.register_forward_hook(watch(name)) for name, module in group.items()]
        with _removed([*hooks, embeddings.register_forward_hook(require_gradient)]):
            _backward_each(peft_model, rows, device)
    return covariances, fishers


def profile(peft_model: PeftModel, rows: Sequence[Row], device: torch.device, path: Path) -> None:
    """Write where the time goes, for a few samples: the gradient pass, then one Fisher pass."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    few = rows[:PROFILED_SAMPLES]
    text: list[str] = []
    group = layer_groups(peft_model)[0]
    for title, work in (
        ("full-gradient pass", lambda: full_gradient(peft_model, few, device)),
        (f"one Fisher pass, {GROUP} decoder layers", lambda: group_fisher(peft_model, group, few, device)),
    ):
        with torch.profiler.profile(activities=kinds) as profiler:
            work()
            _wait(device)
        table = profiler.key_averages().table(
            sort_by=f"self_{device.type}_time_total", row_limit=PROFILED_OPERATIONS, max_name_column_width=60
        )
        text += [f"{title}, {len(few)} samples", *(line.rstrip() for line in table.splitlines()), ""]
    path.write_text("\n".join(text), encoding="utf-8")


def _backward_each(peft_model: PeftModel, rows: Iterable[Row], device: torch.device) -> None:
    model = peft_model.get_base_model()
    with peft_model.disable_adapter():
        for row in rows:
            model(**{key: value.to(device) for key, value in collate([row]).items()}).loss.backward()


@contextlib.contextmanager
def _frozen_but(model: nn.Module, trained: Iterable[Tensor]) -> Iterator[None]:
    """Train mode, only these parameters with gradients; flags put back and gradients dropped afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.train()
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextlib.contextmanager
def _removed(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
