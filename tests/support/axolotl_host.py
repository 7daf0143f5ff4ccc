"""Axolotl's config loading as its commands run it, for the tests of the plugin. Import it after Axolotl's own skip."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from axolotl_lora_da.bare_name import PLUGIN

BASE = {
    "base_model": "no/such-model",
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "learning_rate": 1e-4,
    "sequence_len": 64,
}


@pytest.fixture
def fresh_manager(monkeypatch):
    """Axolotl keeps plugins for the life of the process."""
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", type(PluginManager.plugins)())


def raw(**keys: Any) -> DictDefault:
    """A config as read from YAML."""
    return DictDefault({**BASE, "plugins": [PLUGIN], **keys})


def load(**keys: Any) -> DictDefault:
    """What every command does first: register the plugins on the raw config, then validate it."""
    cfg = raw(**keys)
    prepare_plugins(cfg)
    return validate_config(cfg)


def callbacks(cfg: DictDefault, trainer: Any = None) -> list[Any]:
    """What only training does."""
    return PluginManager.get_instance().add_callbacks_post_trainer(cfg, trainer or SimpleNamespace())
