"""A stand-in for the plugin loader of Axolotl 0.21, which needs a newer Python than the tests have.

Same names, same order of events, nothing else of Axolotl: every installed distribution's entry points in the group
`axolotl.plugins` are registered in every run, whether or not `plugins:` names them, before the configured names are
resolved; a name that does not load is passed over if it came from an entry point and is fatal if the user wrote it.
"""

from __future__ import annotations

from pathlib import Path

BASE = """
import importlib
from importlib.metadata import entry_points

GROUP = "axolotl.plugins"


class BasePlugin:
    def register(self, cfg): ...
    def on_config_validation_error(self, cfg): ...
    def get_input_args(self): ...
    def get_training_args_mixin(self): ...
    def get_trainer_cls(self, cfg): ...
    def get_adapter_capabilities(self): return []
    def add_callbacks_pre_trainer(self, cfg, model): return []
    def add_callbacks_post_trainer(self, cfg, trainer): return []


def normalize_plugin_name(target):
    return target.replace(":", ".", 1)


def get_builtin_plugins():
    return tuple(dict.fromkeys(normalize_plugin_name(point.value) for point in entry_points(group=GROUP)))


def load_plugin(plugin_name):
    module, colon, cls = plugin_name.partition(":")
    if not colon:
        module, cls = plugin_name.rsplit(".", 1)
    return getattr(importlib.import_module(module), cls)()


class PluginManager:
    _instance = None

    def __new__(cls):
        if cls._instance is None:
            cls._instance = super().__new__(cls)
            cls._instance.plugins = {}
        return cls._instance

    @staticmethod
    def get_instance():
        manager = PluginManager()
        for name in get_builtin_plugins():
            if name not in manager.plugins:
                manager.register(name)
        return manager

    def register(self, plugin_name, *, required=False):
        try:
            self.plugins[plugin_name] = load_plugin(plugin_name)
        except Exception as error:
            if required:
                raise
            print("passed over", plugin_name, repr(error))

    def get_input_args(self):
        return [args for args in (plugin.get_input_args() for plugin in self.plugins.values()) if args is not None]

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [c for plugin in self.plugins.values() for c in plugin.add_callbacks_post_trainer(cfg, trainer) or []]
"""

CONFIG = """
from axolotl.integrations.base import PluginManager, get_builtin_plugins, normalize_plugin_name


def prepare_plugins(cfg):
    installed = get_builtin_plugins()
    configured = [normalize_plugin_name(name) for name in cfg.get("plugins") or []]
    if not installed and not configured:
        return
    manager = PluginManager.get_instance()
    for name in dict.fromkeys(configured):
        if name not in manager.plugins:
            manager.register(name, required=True)
    for name in dict.fromkeys((*installed, *configured)):
        if name in manager.plugins:
            manager.plugins[name].register(cfg)
"""

LOGGING = """
from logging import getLogger as get_logger
"""


def write(site: Path, entry_points: dict[str, str]) -> None:
    """Makes `site` a place where the stand-in is installed, and beside it a distribution with these entry points."""
    for name, text in {
        "__init__": "",
        "integrations/__init__": "",
        "integrations/base": BASE,
        "utils/__init__": "",
        "utils/config": CONFIG,
        "utils/logging": LOGGING,
    }.items():
        file = site / "axolotl" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    info = site / "lora_da-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-da\nVersion: 0.1.0\n")
    lines = [f"{name} = {target}" for name, target in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[axolotl.plugins]", *lines, ""]))
