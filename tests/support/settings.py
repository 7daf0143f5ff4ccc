"""Settings of most tests."""

from __future__ import annotations

from typing import Any

from lora_da import LoraDAConfig


def as_solved(**settings: Any) -> LoraDAConfig:
    """The defaults, but that the step is written as it was solved, and no document is kept from the estimate to measure
    it by."""
    return LoraDAConfig(**{"first_step": "gamma", **settings})
