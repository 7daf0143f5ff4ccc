"""The settings: what is out of range is refused by name, and a preset's numbers can all be replaced."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lora_da import LoraDAConfig, LoraDAError
from lora_da.config import PRESETS
from lora_da.methods import METHODS
from lora_da.methods.method import Method

pytestmark = pytest.mark.once

BAD_SETTINGS = [
    ("method", ["lora", None, 3]),
    ("preset", ["papper", 3, {"gamma": 1.0}]),
    ("averaging", ["sample", 1]),
    ("samples", [0, -1, 2.0, "256", True]),
    ("seed", [-1, 0.5, "1", True]),
    ("population_size", [0, -5, 1e6, "1000"]),
    ("variance_weight", [-0.1, float("nan"), float("inf"), "1", True]),
    ("damping", [-1e-9, float("nan"), "0.1"]),
    ("gamma", [0, 0.0, -1, float("inf"), "1024"]),
    ("first_step", ["mesured", 3, True]),
    ("chosen_rows", [0, -0.5, 1.5, float("nan"), "half", True]),
    ("match_rate", ["yes", 1, 0, 0.125]),
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


TAKES = {
    "filet": {"averaging": "samples"},
    "cntlora": {"damping": 0.5},
    "lora_one": {"averaging": "samples", "gamma": 7.0, "first_step": "gamma"},
    "lora_ga": {"averaging": "samples", "gamma": 7.0},
}
OF_LORA_DA = {
    "population_size": 1000,
    "averaging": "tokens",
    "variance_weight": 0.0,
    "damping": 0.0,
    "gamma": 64.0,
    "chosen_rows": 0.5,
    "match_rate": False,
    "full_fisher_up_to": 0,
}


@pytest.mark.parametrize("method", TAKES)
def test_another_methods_own_numbers_are_taken(method):
    given = LoraDAConfig(method=method, **TAKES[method]).numbers()
    assert {name: value for name, value in dataclasses.asdict(given).items() if value is not None} == TAKES[method]
    defaults = LoraDAConfig(method=method).numbers()
    assert defaults != given
    assert [v is None for v in vars(defaults).values()] == [v is None for v in vars(given).values()]


def test_published_numbers():
    gammas = {method: LoraDAConfig(method=method).numbers().gamma for method in ("lora_one", "lora_ga")}
    assert gammas == {"lora_one": 128.0, "lora_ga": 16.0}


@pytest.mark.parametrize("method", TAKES)
def test_numbers_that_a_method_has_no_use_for_are_refused(method):
    """Whatever the number, 0 too; the message names the key, the method and what it takes."""
    refused = [name for name in OF_LORA_DA if name not in TAKES[method]]
    assert refused
    for name in refused:
        with pytest.raises(LoraDAError) as error:
            LoraDAConfig(method=method, **{name: OF_LORA_DA[name]})
        assert str(error.value) == (
            f"lora_da.{name} is {OF_LORA_DA[name]!r}, which method {method} has no use for; leave it out (of the "
            f"numbers, this method takes {' and '.join(TAKES[method])})"
        )
    LoraDAConfig(**OF_LORA_DA)


@pytest.mark.parametrize("method", TAKES)
@pytest.mark.parametrize("preset", ["default", PRESETS["paper"]])
def test_a_preset_is_of_lora_da_alone(method, preset):
    with pytest.raises(LoraDAError, match=rf"^lora_da\.preset is .* variants of method lora_da; .* method {method}$"):
        LoraDAConfig(method=method, preset=preset)


def test_no_preset_is_the_default_one():
    assert LoraDAConfig().numbers() == LoraDAConfig(preset="default").numbers() == PRESETS["default"]


def test_settings_say_what_is_in_use():
    assert LoraDAConfig(gamma=7.0).settings()["preset"] == "default"
    assert LoraDAConfig(preset="paper", gamma=7.0).settings() == {
        **dataclasses.asdict(LoraDAConfig(preset="paper")),
        **dataclasses.asdict(PRESETS["paper"]),
        "gamma": 7.0,
        "first_step": "gamma",
    }
    other = LoraDAConfig(method="lora_one").settings()
    assert (other["method"], other["preset"], other["gamma"], other["damping"]) == ("lora_one", None, 128.0, None)


def test_a_preset_of_ones_own():
    own = dataclasses.replace(PRESETS["paper"], gamma=3.0, match_input_energy=True)
    assert LoraDAConfig(preset=own).numbers() == own
    assert LoraDAConfig(preset=own, gamma=5.0).numbers() == dataclasses.replace(own, gamma=5.0)
    with pytest.raises(LoraDAError, match=r"^lora_da\.gamma is -1; set a number above 0"):
        LoraDAConfig(preset=dataclasses.replace(own, gamma=-1))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_number_of_a_preset_can_be_overridden(preset):
    """Also by a number that is false: 0 is a value and not "what the preset says"."""
    plain = dataclasses.asdict(LoraDAConfig(preset=preset).numbers())
    assert plain == dataclasses.asdict(PRESETS[preset])
    numbers = [name for name, value in plain.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    assert numbers
    for name in numbers:
        for value in {"gamma": (7,), "chosen_rows": (0.25, 1)}.get(name, (7, 0)):
            resolved = LoraDAConfig(preset=preset, **{name: value}).numbers()
            implied = {"first_step": "gamma", "match_rate": False} if name == "gamma" else {}
            assert dataclasses.asdict(resolved) == {**plain, **implied, name: value}
    for averaging in ("samples", "tokens"):
        assert LoraDAConfig(preset=preset, averaging=averaging).numbers().averaging == averaging


def test_a_gamma_that_is_set_is_the_length_of_the_step() -> None:
    """And the way in which the default preset went before it measured."""
    found = LoraDAConfig(gamma=1024.0).numbers()
    assert found == dataclasses.replace(PRESETS["default"], first_step="gamma", gamma=1024.0, match_rate=False)
    assert LoraDAConfig(preset="reference", first_step="measured").numbers().first_step == "measured"
    assert LoraDAConfig(first_step="none").numbers().first_step == "none"
    for other in ("measured", "none"):
        with pytest.raises(LoraDAError, match=rf"^lora_da\.gamma is 16\.0 and .*first_step '{other}'.*leave one"):
            LoraDAConfig(gamma=16.0, first_step=other)


def own_method(**changes: object) -> Method:
    return dataclasses.replace(METHODS["lora_da"], **{"name": "own", **changes})


def test_a_method_of_ones_own() -> None:
    """Its numbers, presets and name are its own, and what it has no use for is refused as of the others."""
    own = own_method(presets={"default": METHODS["lora_ga"].presets["default"]}, population=False)
    config = LoraDAConfig(method=own, gamma=5.0)
    assert (
        config.numbers().gamma == 5.0 and config.settings()["method"] == "own" and config.settings()["preset"] is None
    )
    with pytest.raises(LoraDAError, match="variance_weight is 1, which method own has no use for"):
        LoraDAConfig(method=own, variance_weight=1)
    two = own_method(presets={"default": PRESETS["default"], "other": PRESETS["paper"]})
    assert LoraDAConfig(method=two, preset="other").numbers() == PRESETS["paper"]
    with pytest.raises(LoraDAError, match="preset is 'paper'; set one of default, other"):
        LoraDAConfig(method=two, preset="paper")
    with pytest.raises(LoraDAError, match="method own has no preset `default` among other"):
        own_method(presets={"other": PRESETS["paper"]})


@pytest.mark.parametrize("name", ["own", "lora_da"])
def test_a_method_of_ones_own_is_not_kept(name: str, tmp_path: Path) -> None:
    """A file in the cache could be of what it was before."""
    own = own_method(name=name, solve=lambda *args: None)
    with pytest.raises(LoraDAError, match=f"method {name} is one of your own.*leave cache_dir out"):
        LoraDAConfig(method=own, cache_dir=str(tmp_path))
    assert LoraDAConfig(method=METHODS["lora_da"], cache_dir=str(tmp_path)).settings()["method"] == "lora_da"
