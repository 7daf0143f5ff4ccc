"""A picture of a model and of the random generators: two pictures are equal if nothing was left behind in between."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Same:
    """Equal to another only if both hold the very same object; keeps it alive, so that its id is not given away."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    def __repr__(self) -> str:
        return f"<{type(self.held).__name__} at {id(self.held):#x}>"


def content(tensor: Tensor | None) -> str | None:
    """A hash of every bit; None where there are none."""
    if tensor is None or tensor.is_meta:
        return None
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def model_picture(model: nn.Module) -> dict[str, Any]:
    """Weights, gradients, flags, hooks, attributes and configs of every module, by a name that says which."""
    picture: dict[str, Any] = {}
    for name, tensor in [*named_tensors(model)]:
        picture[f"{name}: bits"] = content(tensor)
        picture[f"{name}: storage"] = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), Same(tensor))
        picture[f"{name}: requires_grad"] = tensor.requires_grad
        picture[f"{name}: grad"] = (Same(tensor.grad), content(tensor.grad))
    for name, config in getattr(model, "peft_config", {}).items():
        picture[f"peft_config[{name}]"] = repr(config)
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            picture[f"{path}.{attribute}"] = shallow(value)
        config = vars(module).get("config")
        if config is not None and hasattr(config, "to_dict"):
            picture[f"{path}.config"] = {key: shallow(value) for key, value in vars(config).items()}
    return picture


def random_picture() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "torch": content(torch.get_rng_state()),
        "numpy": (name, keys.tobytes(), *rest),
        "random": random.getstate(),
        "autograd": torch.is_grad_enabled(),
    }


def picture(model: nn.Module) -> dict[str, Any]:
    return {**model_picture(model), **random_picture()}


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names under which two pictures differ."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name, ...) != after.get(name, ...))


def shallow(value: Any) -> Any:
    """A value as it is if it is plain, its entries if it is a container, else its identity."""
    if isinstance(value, PLAIN):
        return value if value == value else "nan"
    if isinstance(value, dict):
        return {"keys": [shallow(key) for key in value], "values": [shallow_entry(entry) for entry in value.values()]}
    if isinstance(value, (list, tuple)):
        return [shallow_entry(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if callable(value) and hasattr(value, "__self__"):
        return (Same(value.__self__), value.__name__)
    return Same(value)


def shallow_entry(value: Any) -> Any:
    return value if isinstance(value, PLAIN) else Same(value)
