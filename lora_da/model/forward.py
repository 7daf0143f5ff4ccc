"""Forwards other than the model's own: a module's replaced by another, and what one keeps held where it is."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lora_da.errors import LoraDAError
from lora_da.memory import is_out_of_memory


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module(…)` runs `forward`; before and after, whatever it ran before (another library's wrapper included)."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextlib.contextmanager
def without_its_inputs(refusal: Callable[[Exception], Exception]) -> Iterator[None]:
    """Run a part of a model on less than the model gives it: where it fails for that, raise what `refusal` makes of it.

    An error of memory, of an accelerator, of other processes, or of our own is raised as it is.
    """
    try:
        yield
    except (LoraDAError, torch.distributed.DistError):
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
            raise
        raise refusal(error) from error


class _HandedOver(Exception):
    """Leaves a forward where it calls a part of the model, with what it hands that."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs


def handed_to(part: nn.Module, model: nn.Module, **inputs: Any) -> dict[str, Any] | None:
    """What a model's own forward hands one of its parts, by name; None if it never calls it.

    The part does not run, and the forward ends there. It is no call of the model: no hook of it sees this one, nor
    gathers for it what is sharded.
    """

    def hand_over(*args: Any, **kwargs: Any) -> Any:
        raise _HandedOver(args, kwargs)

    try:
        with replaced(part, hand_over):
            model.forward(**inputs)
    except _HandedOver as found:
        names = list(inspect.signature(type(part).forward).parameters)[1:]  # the first is the part itself
        return {**dict(zip(names, found.args, strict=False)), **found.kwargs}
    return None


def hidden_of(output: Any) -> torch.Tensor | None:
    """The hidden states in what a body returns: an output of the library, a tuple, or they alone; None if unknown."""
    hidden = output[0] if isinstance(output, tuple) and output else getattr(output, "last_hidden_state", output)
    return hidden if isinstance(hidden, torch.Tensor) else None


def output_like(output: Any, hidden: torch.Tensor) -> Any:
    """What a body of that output would return with these hidden states."""
    if isinstance(output, torch.Tensor):
        return hidden
    return (hidden,) if isinstance(output, tuple) else type(output)(last_hidden_state=hidden)


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what a model returns for labels, an output of the library or a tuple."""
    loss: torch.Tensor = output[0] if isinstance(output, tuple) else output.loss
    return loss


def logits_of(output: Any, with_loss: bool) -> torch.Tensor:
    """The logits in what a model returns, an output of the library or a tuple, where they are behind the loss."""
    logits: torch.Tensor = output[int(with_loss)] if isinstance(output, tuple) else output.logits
    return logits


def kept_on_device() -> torch.autograd.graph.saved_tensors_hooks:
    """Activations that are used at once or not at all: an offloading context around them shall not move them.

    They are kept detached: an operation that keeps its own output would hold itself, where no collector sees it.
    """
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
