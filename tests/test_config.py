"""The settings: what is out of range is refused by name, and a preset's numbers can all be replaced."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lora_da import LoraDAConfig, LoraDAError
from lora_da.config import PRESETS

pytestmark = pytest.mark.once

BAD_SETTINGS = [
    ("method", ["lora", None, 3]),
    ("preset", ["papper", 3, {"gamma": 1.0}]),
    ("averaging", ["sample", 1]),
    ("samples", [0, -1, 2.0, "256", None, True]),
    ("seed", [-1, 0.5, "1", True]),
    ("population_size", [0, -5, 1e6, "1000"]),
    ("variance_weight", [-0.1, float("nan"), float("inf"), "1", True]),
    ("damping", [-1e-9, float("nan"), "0.1"]),
    ("gamma", [0, 0.0, -1, float("inf"), "1024"]),
    ("full_fisher_up_to", [-1, 4096.0, "all"]),
    ("memory_budget", [0, -1.0, float("nan"), "2GB"]),
    ("cache_dir", ["", " ", 3, True, Path("folder")]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD_SETTINGS for value in values])
def test_settings_out_of_range(field, value):
    """The message names the field, what it was and what to set."""
    with pytest.raises(LoraDAError) as refused:
        LoraDAConfig(**{field: value})
    message = str(refused.value)
    assert message.startswith(f"lora_da.{field} is {value!r}; set ")


def test_every_setting_has_a_bad_value():
    assert {field for field, _ in BAD_SETTINGS} == {field.name for field in dataclasses.fields(LoraDAConfig)}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_number_of_a_preset_can_be_overridden(preset):
    """Also by a number that is false: 0 is a value and not "what the preset says"."""
    plain = dataclasses.asdict(LoraDAConfig(preset=preset).resolved_preset())
    assert plain == dataclasses.asdict(PRESETS[preset])
    numbers = [name for name, value in plain.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    assert numbers
    for name in numbers:
        for value in (7, 0) if name != "gamma" else (7,):
            resolved = LoraDAConfig(preset=preset, **{name: value}).resolved_preset()
            assert dataclasses.asdict(resolved) == {**plain, name: value}
    for averaging in ("samples", "tokens"):
        assert LoraDAConfig(preset=preset, averaging=averaging).resolved_preset().averaging == averaging
