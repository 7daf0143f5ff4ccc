"""The block `lora_da:` in Axolotl's own config loading: what a user writes, and the sentence a slip gets."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

pytest.importorskip("axolotl", reason="Axolotl is not installed")

from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl_host import callbacks, fresh_manager, load, raw  # noqa: F401
from pydantic import ValidationError

from axolotl_lora_da.args import LoraDAArgs
from axolotl_lora_da.bare_name import PLUGIN
from axolotl_lora_da.settings import read_settings
from lora_da.config import PRESETS, LoraDAConfig
from lora_da.errors import LoraDAError

pytestmark = [
    pytest.mark.axolotl,
    pytest.mark.usefixtures("fresh_manager"),
    pytest.mark.filterwarnings("default"),  # Axolotl's imports warn of much
]


def test_without_a_block_the_defaults_serve():
    assert load().lora_da is None


def test_an_empty_block_is_the_defaults():
    assert load(lora_da=None).lora_da is None


def test_the_block_reaches_the_validated_config():
    block = {"preset": "reference", "samples": 32, "damping": 1e-3}
    validated = load(lora_da=block).lora_da
    assert {key: validated[key] for key in block} == block


def test_a_method_reaches_the_validated_config():
    block = {"method": "lora_one", "gamma": "1e2", "averaging": "samples"}
    loaded = load(lora_da=block)
    assert {key: loaded.lora_da[key] for key in block} == {**block, "gamma": 100.0}
    config = read_settings(loaded)
    assert (config.method, config.preset, config.numbers().gamma) == ("lora_one", None, 100.0)


def test_a_preset_is_a_name_in_a_file():
    """In Python it may be an object; pydantic must not make one of a mapping."""
    numbers = dataclasses.asdict(PRESETS["paper"])
    with pytest.raises(LoraDAError, match=r"^lora_da\.preset is \{.*\}; set one of default, reference, paper"):
        load(lora_da={"preset": numbers})
    with pytest.raises(ValidationError, match="preset"):
        LoraDAArgs(lora_da={"preset": numbers})
    assert LoraDAArgs(lora_da={"method": "filet"}).lora_da == LoraDAConfig(method="filet")
    with pytest.raises(ValidationError, match="smaples"):
        LoraDAArgs(lora_da={"method": "filet", "smaples": 3})


def test_yaml_numbers_without_a_dot_are_numbers():
    assert load(lora_da={"damping": "1e-3"}).lora_da.damping == 1e-3


@pytest.mark.parametrize("path", ["1e5", "nan", "12", "./cache", "~/cache"])
def test_a_folder_stays_text_whatever_it_looks_like(path):
    loaded = load(lora_da={"cache_dir": path, "damping": "1e-3"})
    assert loaded.lora_da["cache_dir"] == path
    assert read_settings(loaded).cache_dir == path and read_settings(loaded).damping == 1e-3


def test_a_validated_config_can_be_loaded_again():
    """A Ray worker registers the plugins on the validated config and validates it again."""
    first = load(lora_da={"samples": 32})
    prepare_plugins(first)
    assert validate_config(first).lora_da == first.lora_da


@pytest.mark.parametrize(
    "name",
    [
        "lora-da",
        "loraDA",
        "lora_dA",
        "LoraDA",
        "lora_dta",
        "lora_ad",
        "lorada",
        "LORA_DA",
        "qlora_da",
        "lora_da_config",
    ],
)
def test_a_misspelt_block_is_named_with_the_right_one(name):
    with pytest.raises(LoraDAError, match=rf"^{name} in the config is a key that neither .* rename it to lora_da$"):
        load(**{name: {"samples": 32}})


@pytest.mark.parametrize(
    ("key", "value"), [("lora_r", 4), ("lora_alpha", 8), ("lora_dropout", 0.0), ("lora_on_cpu", True), ("lora", {})]
)
def test_keys_of_axolotl_and_others_are_no_slips(key, value):
    load(**{key: value})


def test_a_close_key_of_the_schema_is_no_slip(monkeypatch):
    """Another plugin may well bring a block of a name like ours."""
    from axolotl.integrations import config

    schema = SimpleNamespace(model_fields={"lora_ga": None})
    monkeypatch.setattr(config, "merge_input_args", lambda: (None, schema))
    prepare_plugins(raw(lora_ga={}))
    with pytest.raises(LoraDAError, match="^lora_gda in the config"):
        prepare_plugins(raw(lora_gda={}))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("smaples", "samples"), ("population-size", "population_size"), ("N", "seed"), ("Gamma", "gamma"), (3, "seed")],
)
def test_a_misspelt_option_is_named_with_the_nearest(key, nearest):
    options = "preset, samples, seed, population_size"
    message = rf"^lora_da\.{key} is not an option of LoRA-DA; the nearest is lora_da\.{nearest}\. The .* {options}"
    if key in ("N", 3):  # nothing is near: some option is named, and all are listed
        message = rf"^lora_da\.{key} is not an option of LoRA-DA; the nearest is .* {options}"
    with pytest.raises(LoraDAError, match=message):
        load(lora_da={key: 32})


@pytest.mark.parametrize("block", [True, "default", 256, [{"samples": 1}]])
def test_a_block_that_is_no_mapping(block):
    with pytest.raises(LoraDAError, match="^lora_da is .* in the config; make it a block of options"):
        load(lora_da=block)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"samples": 0}, r"^lora_da\.samples is 0; set a whole number of at least 1"),
        ({"samples": 1.5}, r"^lora_da\.samples is 1\.5; set a whole number"),
        ({"seed": True}, r"^lora_da\.seed is True"),
        ({"method": "pissa"}, r"^lora_da\.method is 'pissa'; set one of lora_da, filet, cntlora, lora_one, lora_ga"),
        ({"method": "cntlora", "preset": "paper"}, r"^lora_da\.preset is 'paper', and presets .* method cntlora$"),
        ({"method": "filet", "gamma": "1e2"}, r"^lora_da\.gamma is 100\.0, which method filet has no use for"),
        ({"method": "lora_one", "variance_weight": 1}, r"^lora_da\.variance_weight is 1, which method lora_one has"),
        ({"preset": "fast"}, r"^lora_da\.preset is 'fast'; set one of default, reference, paper"),
        ({"gamma": "much"}, r"^lora_da\.gamma is 'much'"),
        ({"damping": "nan"}, r"^lora_da\.damping is nan"),
        ({"cache_dir": 3}, r"^lora_da\.cache_dir is 3; set the path of a folder, as text"),
    ],
)
def test_values_are_checked_at_config_load(block, message):
    with pytest.raises(LoraDAError, match=message):
        load(lora_da=block)


def test_two_names_for_the_plugin():
    inner = "axolotl_lora_da.plugin.LoraDAPlugin"
    with pytest.raises(LoraDAError, match=rf"^plugins names LoRA-DA more than once \({PLUGIN}, {inner}\); keep one"):
        load(plugins=[PLUGIN, inner])
    with pytest.raises(LoraDAError, match="more than once"):
        load(plugins=[PLUGIN, PLUGIN])


def test_a_later_config_may_use_the_other_name():
    """Axolotl keeps plugins for the life of the process: notebooks load one config after the other."""
    load(lora_da={"samples": 32})
    later = load(plugins=["axolotl_lora_da.plugin.LoraDAPlugin"], lora_da={"samples": 16})
    assert later.lora_da.samples == 16
    assert len(callbacks(later)) == 1


def test_inert_when_not_named():
    load()
    others = raw(plugins=["axolotl.integrations.liger.LigerPlugin"], lora_dta={}, adapter=None)
    PluginManager.get_instance().plugins[PLUGIN].register(others)
    assert callbacks(others) == []
