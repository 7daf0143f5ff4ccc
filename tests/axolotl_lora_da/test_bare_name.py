"""The start-up hook among other people's finders and loaders, on a loader module that stands for Axolotl's."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
BASE = "def load_plugin(plugin_name): return plugin_name"
SEES_THE_PLUGIN = """
    from axolotl.integrations import base
    assert base.load_plugin("lora_da") == "axolotl_lora_da.LoraDAPlugin" and base.load_plugin("x.Y") == "x.Y"
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == "axolotl_lora_da.bare_name"]
"""


@pytest.fixture
def run(tmp_path):
    def run(*code: str, archive: bool = False, base: str = BASE) -> None:
        place = tmp_path / ("site.zip" if archive else "site")
        for name, text in (("__init__.py", ""), ("integrations/__init__.py", ""), ("integrations/base.py", base)):
            if archive:
                with zipfile.ZipFile(place, "a") as file:
                    file.writestr(f"axolotl/{name}", text)
            else:
                (place / "axolotl" / name).parent.mkdir(parents=True, exist_ok=True)
                (place / "axolotl" / name).write_text(text)
        # -S: an installed package of ours would bring its own start-up hook.
        head = "import sys; from axolotl_lora_da import bare_name; bare_name.install()\n"
        command = [sys.executable, "-S", "-c", head + "".join(map(textwrap.dedent, code))]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(ROOT)])}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


def test_an_ordinary_import(run):
    run(SEES_THE_PLUGIN)


def test_an_import_from_an_archive(run):
    run(SEES_THE_PLUGIN, archive=True)


def test_a_loader_module_that_changed_is_left_alone(run):
    run("import axolotl.integrations.base as base; assert not hasattr(base, 'load_plugin')", base="")


def test_an_import_that_failed_may_be_tried_again(run):
    run(
        """
        import builtins
        try:
            import axolotl.integrations.base
        except NameError:
            builtins.ready = True
        """,
        SEES_THE_PLUGIN,
        base=f"ready\n{BASE}",
    )


def test_looking_for_the_module_is_not_importing_it(run):
    run(
        """
        import importlib.util
        before = list(sys.meta_path)
        spec = importlib.util.find_spec("axolotl.integrations.base")
        assert type(spec.loader).__name__ == "SourceFileLoader" and spec.loader.get_source(spec.name)
        assert sys.meta_path == before and spec.name not in sys.modules
        assert importlib.util.find_spec("axolotl.integrations.absent") is None
        """,
        SEES_THE_PLUGIN,
    )


def test_a_finder_that_asks_all_the_others(run):
    run(
        """
        class Asking:
            def find_spec(self, name, path=None, target=None):
                for finder in sys.meta_path:
                    if finder is not self and (spec := finder.find_spec(name, path, target)):
                        return spec
        for place in 0, len(sys.meta_path):
            sys.meta_path.insert(place, Asking())
            sys.meta_path[place].find_spec("axolotl.integrations.base", None)
            del sys.meta_path[place]
        sys.meta_path.insert(0, Asking())
        """,
        SEES_THE_PLUGIN,
    )


def test_a_loader_that_takes_no_attributes_still_loads(run):
    run(
        """
        from importlib.machinery import ModuleSpec
        class Loader:
            __slots__ = ()
            def create_module(self, spec): ...
            def exec_module(self, module): module.loaded = True
        class Finder:
            def find_spec(self, name, path=None, target=None):
                return ModuleSpec(name, Loader()) if name == "axolotl.integrations.base" else None
        sys.meta_path.append(Finder())
        sys.meta_path[:] = [sys.meta_path[0], sys.meta_path[-1], *sys.meta_path[1:-1]]
        import axolotl.integrations.base
        assert axolotl.integrations.base.loaded
        """
    )


def test_teaching_twice_changes_nothing(run):
    run(
        SEES_THE_PLUGIN,
        """
        taught = base.load_plugin
        bare_name.install()
        assert base.load_plugin is taught
        """,
    )
