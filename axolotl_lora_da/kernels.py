"""Takes Axolotl's fused LoRA kernels off a model for the estimation pass, and puts the same objects back."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import nn

from lora_da.model.fused import lifted

# Where the functions of the kernels live. They are told by that and not by the models they serve: Axolotl adds models
# with every release.
KERNEL_MODULES = (
    "axolotl.kernels.lora",
    "axolotl.monkeypatch.lora_kernels",
    "axolotl.integrations.kernels.libs.dsv4.lora_mlp",
)


def lifted_lora_kernels(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, every projection is called as a module again, so that hooks on it fire.

    Axolotl binds its kernels to single modules: as `apply_qkv` and `apply_o`, which must stay callable since it has
    rewritten the attention's forward to call them, and else as a `forward` or a linear attention's `apply_…`, without
    which the class's own code runs.
    """
    return lifted(model, _is_kernel, _plain)


def _is_kernel(name: str, method: Any) -> bool:
    bound = isinstance(method, MethodType) and (name == "forward" or name.startswith("apply_"))
    return bound and method.__func__.__module__ in KERNEL_MODULES


def _plain(module: nn.Module, name: str) -> MethodType | None:
    from axolotl.monkeypatch import lora_kernels

    if name == "apply_qkv":
        shares_keys = getattr(module, "v_proj", None) is None  # Gemma 4 takes the keys for values
        plain = lora_kernels.original_apply_qkv_optional_v if shares_keys else lora_kernels.original_apply_qkv
        return MethodType(plain, module)
    return MethodType(lora_kernels.original_apply_o, module) if name == "apply_o" else None
