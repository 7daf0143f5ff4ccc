"""The user's data: drawn, batched, and counted token by token. Knows no other room."""

from __future__ import annotations

from lora_da.samples.batch import Batch
from lora_da.samples.draw import InitData

__all__ = ["Batch", "InitData"]
