"""The plugin: reads the config, refuses what cannot be served, and hands the work to the callback of the core."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.logging import get_logger

from axolotl_lora_da.settings import read_settings
from lora_da.errors import LoraDAError

LOG = get_logger(__name__)


class LoraDAPlugin(BasePlugin):
    """LoRA-DA for the LoRA or QLoRA adapter of a run.

    Axolotl keeps plugins for the life of the process, so each method first asks whether this config names this one.
    """

    def get_input_args(self) -> str | None:
        """The schema of the block, from one instance only: Axolotl makes all answers bases of one class."""
        others = [p for p in PluginManager.get_instance().plugins.values() if isinstance(p, LoraDAPlugin)]
        return None if others and others[0] is not self else "axolotl_lora_da.args.LoraDAArgs"

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Checks the config as the user wrote it, in every command: slips are named before the schema drops them."""
        names = [name for name, _ in _named(cfg)]
        if len(names) > 1:
            raise LoraDAError(f"plugins names LoRA-DA more than once ({', '.join(names)}); keep one of them")
        if names:
            read_settings(cfg)

    def add_callbacks_post_trainer(self, cfg: Mapping[str, Any], trainer: Any) -> list[Any]:
        """The callback that initialises the adapter when training begins."""
        if not any(plugin is self for _, plugin in _named(cfg)):
            return []
        # Training only: a merge or a chat loads the plugin too, and must not pay for these.
        from axolotl_lora_da.kernels import lifted_lora_kernels
        from axolotl_lora_da.training import check_training
        from lora_da.callback import LoraDACallback

        check_training(cfg, trainer)
        if cfg.get("relora"):
            LOG.warning("relora: LoRA-DA initialises the first adapter only; after each restart PEFT's init stands")
        # Opened at each training step, and forgets then what the one before has left: so it does for each pass.
        offload = getattr(trainer, "activation_offload_context", nullcontext())
        return [LoraDACallback(read_settings(cfg), during=lifted_lora_kernels, offloading=lambda model: offload)]


def _named(cfg: Mapping[str, Any]) -> list[tuple[str, LoraDAPlugin]]:
    """The instances that the config's `plugins:` stands for, each with the name it is given there."""
    plugins = PluginManager.get_instance().plugins
    # Axolotl 0.21 keeps `module:class` under `module.class`.
    found = [(name, plugins.get(name, plugins.get(name.replace(":", ".")))) for name in cfg.get("plugins") or []]
    return [(name, plugin) for name, plugin in found if isinstance(plugin, LoraDAPlugin)]
