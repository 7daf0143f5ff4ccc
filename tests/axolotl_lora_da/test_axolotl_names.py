"""The bare and the dotted name through the loader of the installed Axolotl."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("axolotl", reason="Axolotl is not installed")

from axolotl.cli.config import prepare_plugins
from axolotl.integrations import base
from axolotl_host import fresh_manager, raw  # noqa: F401

from axolotl_lora_da import bare_name

pytestmark = [
    pytest.mark.axolotl,
    pytest.mark.usefixtures("fresh_manager"),
    pytest.mark.filterwarnings("default"),  # Axolotl's imports warn of much
]

ROOT = Path(__file__).parents[2]


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", **env}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_bare_name_dotted_name_and_inertness_through_the_real_loader():
    done = run(
        """
        import importlib.util, sys
        from axolotl_lora_da import bare_name
        bare_name.install(); bare_name.install()
        watchers = lambda: [finder for finder in sys.meta_path if type(finder).__module__ == bare_name.__name__]
        assert len(watchers()) == 1 and "axolotl" not in sys.modules and "torch" not in sys.modules
        spec = importlib.util.find_spec("axolotl.integrations.base")
        assert type(spec.loader).__name__ == "SourceFileLoader" and spec.loader.get_source(spec.name)
        assert len(watchers()) == 1, "looking is not importing"

        from axolotl.integrations import base
        assert not watchers()
        assert "axolotl_lora_da.plugin" not in sys.modules, "inert until named"
        assert type(base.load_plugin("lora_da")).__name__ == "LoraDAPlugin"
        assert type(base.load_plugin("axolotl_lora_da.LoraDAPlugin")) is type(base.load_plugin("lora_da"))
        assert type(base.load_plugin("axolotl.integrations.liger.LigerPlugin")).__name__ == "LigerPlugin"
        taught = base.load_plugin
        bare_name.install()
        assert base.load_plugin is taught and not watchers(), "taught once"

        from axolotl.cli.config import prepare_plugins
        from axolotl.utils.dict import DictDefault
        prepare_plugins(DictDefault(plugins=["lora_da"], lora_da={"samples": 3}))
        try:
            prepare_plugins(DictDefault(plugins=["lora_da", "axolotl_lora_da.LoraDAPlugin"]))
        except RuntimeError as error:
            assert "(lora_da, axolotl_lora_da.LoraDAPlugin); keep one" in str(error)
        else:
            raise AssertionError("two names were accepted")
        """
    )
    assert done.returncode == 0, done.stderr


def test_installing_after_axolotl_teaches_its_loader_at_once(monkeypatch):
    monkeypatch.setattr(base, "load_plugin", inspect.unwrap(base.load_plugin))
    with pytest.raises(ValueError, match="not enough values to unpack"):  # what the bare name meets without the hook
        base.load_plugin("lora_da")
    bare_name.install()
    assert type(base.load_plugin("lora_da")) is type(base.load_plugin(bare_name.PLUGIN))


@pytest.mark.parametrize("name", ["lora_da", bare_name.PLUGIN])
def test_a_plugin_that_does_not_import_stops_the_run(monkeypatch, name):
    """Axolotl passes over an ImportError, and would train plain LoRA."""
    monkeypatch.setattr(base, "load_plugin", inspect.unwrap(base.load_plugin))
    bare_name.install()
    monkeypatch.setitem(sys.modules, "axolotl_lora_da.plugin", None)
    with pytest.raises(RuntimeError, match="the LoRA-DA plugin cannot be imported"):
        prepare_plugins(raw(plugins=[name]))
