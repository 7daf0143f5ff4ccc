"""A plugin for tests: of several processes Axolotl puts each model on a GPU of its own, and there is none."""

from axolotl.integrations.base import BasePlugin


class OnTheCPU(BasePlugin):
    def register(self, cfg):
        from axolotl.loaders.model import ModelLoader

        original = ModelLoader._set_device_map_config

        def on_the_cpu(loader):
            loader.cfg.device_map = {"": "cpu"}
            original(loader)

        ModelLoader._set_device_map_config = on_the_cpu
