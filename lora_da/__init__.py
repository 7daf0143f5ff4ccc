"""Data-aware LoRA initialisation (LoRA-DA, arXiv 2510.24561) for Axolotl, TRL and PEFT.

The names below are imported when they are first used: Axolotl reads `LoraDAConfig` at config load, without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_da.config import LoraDAConfig
    from lora_da.errors import LoraDAError
    from lora_da.export.folder import export_initial_adapter
    from lora_da.initialize import initialize_lora_da_weights
    from lora_da.report import InitReport

__version__ = "0.1.0"
__all__ = [
    "InitReport",
    "LoraDAConfig",
    "LoraDAError",
    "__version__",
    "export_initial_adapter",
    "initialize_lora_da_weights",
]

_HOMES = {
    "LoraDAConfig": "lora_da.config",
    "LoraDAError": "lora_da.errors",
    "InitReport": "lora_da.report",
    "export_initial_adapter": "lora_da.export.folder",
    "initialize_lora_da_weights": "lora_da.initialize",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
