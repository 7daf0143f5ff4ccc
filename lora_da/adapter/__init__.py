"""Everything PEFT: find the layers of an adapter, refuse what cannot be started by data, write the factors in place."""

from __future__ import annotations

from lora_da.adapter.find import describe_left, find_adapter, stored_base
from lora_da.adapter.layer import Adapter, AdapterLayer

__all__ = ["Adapter", "AdapterLayer", "describe_left", "find_adapter", "stored_base"]
