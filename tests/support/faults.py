"""Faults that strike at a stage of an initialisation: an error, an interrupt, memory that runs out, a NaN.

And layers whose gradients are wrong all along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Document, pad
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

import lora_da.methods.lora_da
from lora_da.collect.schedule import Schedule
from lora_da.collect.sums import SegmentSums
from lora_da.model.blocks import BlockSequence
from lora_da.solve import LayerSolver
from lora_da.statistics import LayerSums

NAN = "NaN"
Kind = type[BaseException] | str


class Fault:
    """Strikes at the n-th call, and never again. `swept`: the samples are being run for their statistics."""

    def __init__(self, kind: Kind, call: int) -> None:
        self.kind, self.left, self.swept = kind, call, False

    @property
    def struck(self) -> bool:
        return self.left <= 0

    def __call__(self, tensor: Tensor | None = None) -> Tensor | None:
        """What the stage goes on with: the tensor as it is, or all NaN."""
        self.left -= 1
        if self.left != 0:
            return tensor
        if isinstance(self.kind, str):
            assert tensor is not None
            return tensor * torch.nan
        raise self.kind("midway")

    def in_the_sweep(self, tensor: Tensor) -> Tensor:
        """Count as a call, in forwards of the sweep whose activations are kept."""
        return self(tensor) if self.swept and torch.is_grad_enabled() else tensor  # type: ignore[return-value]


Lay = Callable[[pytest.MonkeyPatch, PeftModel, Fault], None]


def block(model: PeftModel, number: int) -> Any:
    """An MLP, whatever the family calls it."""
    decoder = model.get_base_model().get_decoder()
    return (decoder.layers if hasattr(decoder, "layers") else decoder.h)[number].mlp


def begin_the_sweep(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    original = Schedule.run

    def run(self: Schedule, *args: Any) -> None:
        fault.swept = True
        original(self, *args)

    patch.setattr(Schedule, "run", run)


def in_the_survey(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    block(model, 0).register_forward_hook(lambda module, args, output: output if fault.swept else fault(output))


def at_the_borders(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    """While hidden states are laid down between segments."""
    original = BlockSequence.run

    def run(self: BlockSequence, hidden: Any, keep: Any, **inputs: Any) -> Any:
        faulty = {number: lambda state, put=put: put(fault(state)) for number, put in keep.items()}
        return original(self, hidden, faulty if fault.swept else keep, **inputs)  # not while a block is measured

    patch.setattr(BlockSequence, "run", run)


def in_the_forward(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    block(model, 1).register_forward_hook(lambda module, args, output: fault.in_the_sweep(output))


def in_the_head(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    """While the decoder is stood in for by its own output."""
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: fault.in_the_sweep(output))


def in_the_backward(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    def watch(module: Any, args: Any, output: Tensor) -> None:
        if fault.swept and output.requires_grad:
            output.register_hook(fault)

    block(model, 1).register_forward_hook(watch)


def while_summing(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    original = LayerSums.add
    patch.setattr(LayerSums, "add", lambda self, x, d: original(self, x, fault(d)))


def while_averaging(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    original = SegmentSums.take_statistics

    def take(self: SegmentSums, name: str, n_units: int, scale: float) -> Any:
        found = original(self, name, n_units, scale)
        found.grad.copy_(fault(found.grad))
        return found

    patch.setattr(SegmentSums, "take_statistics", take)


def in_the_solver(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    original = lora_da.methods.lora_da.largest_eigenpairs

    def largest_eigenpairs(apply: Any, start: Tensor, k: int, *tolerance: float) -> Any:
        pairs = original(apply, start, k, *tolerance)
        if k > 1:  # those for the subspace, not the single ones for a norm
            pairs.vectors.copy_(fault(pairs.vectors))
        return pairs

    patch.setattr(lora_da.methods.lora_da, "largest_eigenpairs", largest_eigenpairs)


def between_layers(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    """When a layer's factors are handed over."""
    original = LayerSolver.solve
    patch.setattr(LayerSolver, "solve", lambda self, *args: (fault(), original(self, *args))[1])


class Parameter(torch.nn.Parameter):
    """A parameter whose writing fails once."""

    fault: Fault

    def copy_(self, value: Tensor) -> Tensor:
        self.fault()
        return super().copy_(value)


def while_writing(patch: pytest.MonkeyPatch, model: PeftModel, fault: Fault) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".mlp." in name:
            parameter.__class__ = Parameter
            parameter.fault = fault


def poison(model: PeftModel, layer: str, factor: float) -> None:
    """Multiply the gradient at one layer's output, behind everything else in the model that reads it."""

    def observe(module: Any, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)

    model.get_submodule(layer).register_forward_hook(observe)


class Rows:
    """A dataset whose rows, or their collator, break."""

    def __init__(self, rows: list[Document], fault: Fault, where: str) -> None:
        self.rows, self.fault, self.where = rows, fault, where

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Document:
        if self.where == "row":
            self.fault()
        return self.rows[index]

    def collate(self, rows: list[Document]) -> dict[str, Tensor]:
        if self.where == "collator":
            self.fault()
        return pad(rows)

    def loader(self) -> DataLoader:
        return DataLoader(self, batch_size=3, shuffle=True, collate_fn=self.collate)


STAGES: dict[str, Lay] = {
    "row": lambda patch, model, fault: None,
    "collator": lambda patch, model, fault: None,
    "survey": in_the_survey,
    "survey, a block alone": in_the_survey,
    "survey, a block measured": in_the_survey,
    "borders": at_the_borders,
    "forward": in_the_forward,
    "head": in_the_head,
    "backward": in_the_backward,
    "sums": while_summing,
    "means": while_averaging,
    "solver": in_the_solver,
    "layers": between_layers,
    "writing": while_writing,
}
