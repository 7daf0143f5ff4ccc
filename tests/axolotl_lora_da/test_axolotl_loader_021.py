"""The bare name on Axolotl 0.21 and later: through the entry point alone, without the .pth."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import axolotl_021
import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]


def declared_entry_points() -> dict[str, str]:
    """What pyproject.toml says, so that the stand-in loads what an installation would. Python 3.10 has no tomllib."""
    table = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."axolotl.plugins"]\n')[2]
    return dict(re.findall(r'^([\w-]+) = "([\w.:]+)"$', table.partition("\n[")[0], re.MULTILINE))


@pytest.fixture
def run(tmp_path):
    def run(code: str, entry_points: dict[str, str] | None = None, start_up: str = "") -> str:
        site = tmp_path / f"site{len(list(tmp_path.iterdir()))}"
        axolotl_021.write(site, declared_entry_points() if entry_points is None else entry_points)
        head = """
            import sys
            from axolotl.integrations.base import PluginManager
            from axolotl.utils.config import prepare_plugins
            plugins = lambda: [type(plugin).__name__ for plugin in PluginManager.get_instance().plugins.values()]
        """
        # -S: an installed package of ours would bring its start-up hook and its own entry point.
        command = [sys.executable, "-S", "-c", "\n".join(map(textwrap.dedent, [start_up, head, code]))]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_one_inert_plugin_is_declared():
    assert declared_entry_points() == {"lora-da": "axolotl_lora_da.entry_point:LoraDABareName"}


def test_installed_but_not_named_nothing_happens(run):
    out = run(
        """
        for plugins_key in {}, {"plugins": []}, {"plugins": None}:
            cfg = {**plugins_key, "lora_da": {"smaples": 1}}
            prepare_plugins(cfg)
            manager = PluginManager.get_instance()
            assert plugins() == ["LoraDABareName"], plugins()
            assert manager.get_input_args() == [] and manager.add_callbacks_post_trainer(cfg, None) == []
        assert not {"torch", "pydantic", "axolotl_lora_da.plugin"} & set(sys.modules)
        """
    )
    assert "passed over" not in out


@pytest.mark.compat("axolotl-0.21-loader")
@pytest.mark.parametrize("name", ["lora_da", "axolotl_lora_da.LoraDAPlugin", "axolotl_lora_da:LoraDAPlugin"])
def test_each_name_starts_the_plugin_once(run, name):
    run(
        f"""
        prepare_plugins({{"plugins": [{name!r}], "lora_da": {{"samples": 3}}}})
        manager = PluginManager.get_instance()
        assert plugins() == ["LoraDABareName", "LoraDAPlugin"], plugins()
        assert manager.get_input_args() == ["axolotl_lora_da.args.LoraDAArgs"]
        try:
            prepare_plugins({{"plugins": [{name!r}], "lora_da": {{"smaples": 3}}}})
        except RuntimeError as error:
            assert "lora_da.smaples is not an option of LoRA-DA; the nearest is lora_da.samples" in str(error)
        else:
            raise AssertionError("a misspelt option was accepted")
        """
    )


def test_two_names_are_refused(run):
    run(
        """
        try:
            prepare_plugins({"plugins": ["lora_da", "axolotl_lora_da:LoraDAPlugin"]})
        except RuntimeError as error:
            assert "more than once (lora_da, axolotl_lora_da:LoraDAPlugin)" in str(error)
        else:
            raise AssertionError("two names were accepted")
        """
    )


def test_the_entry_point_is_what_makes_the_bare_name_known(run):
    """The negative control: without it the stand-in fails as Axolotl does."""
    run(
        """
        prepare_plugins({"plugins": ["axolotl_lora_da.LoraDAPlugin"]})
        try:
            prepare_plugins({"plugins": ["lora_da"]})
        except ValueError:
            pass
        else:
            raise AssertionError("the bare name resolved by itself")
        """,
        entry_points={},
    )


def test_with_the_start_up_hook_as_well(run):
    """An installed wheel has both; the loader is taught once."""
    run(
        """
        from axolotl.integrations import base
        from axolotl_lora_da import bare_name
        assert base.load_plugin.knows_lora_da and not hasattr(base.load_plugin.__wrapped__, "knows_lora_da")
        prepare_plugins({"plugins": ["lora_da"]})
        assert not hasattr(base.load_plugin.__wrapped__, "knows_lora_da")
        assert plugins() == ["LoraDABareName", "LoraDAPlugin"], plugins()
        assert not [finder for finder in sys.meta_path if type(finder).__module__ == bare_name.__name__]
        """,
        start_up="import axolotl_lora_da.bare_name; axolotl_lora_da.bare_name.install()",
    )
