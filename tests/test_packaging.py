"""What an installation brings and leaves: the packages and one start-up line, from a wheel and from a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

import lora_da

pytestmark = [pytest.mark.once, pytest.mark.slow]
if find_spec("hatchling") is None or find_spec("pip") is None:
    pytest.skip("hatchling and pip are needed to build the package", allow_module_level=True)

ROOT = Path(__file__).parents[1]
PTH = "axolotl_lora_da.pth"
PACKAGES = {"axolotl_lora_da", "lora_da", "trl_integration"}

HOOKED = """
import sys
watchers = [finder for finder in sys.meta_path if type(finder).__module__ == "axolotl_lora_da.bare_name"]
assert len(watchers) == 1, sys.meta_path
ours = {name for name in sys.modules if name.split(".")[0] in ("lora_da", "axolotl_lora_da", "trl_integration")}
assert ours == {"axolotl_lora_da", "axolotl_lora_da.bare_name"}, ours
assert not {"torch", "peft", "pydantic", "axolotl", "functools"} & set(sys.modules) - started_with
"""

USED = """
import importlib, json, pkgutil, sys
import lora_da
assert "torch" not in sys.modules, "the public names are imported when they are first used"
assert callable(lora_da.initialize_lora_da_weights) and all(hasattr(lora_da, name) for name in lora_da.__all__)
modules = {}
for top in packages:
    modules[top] = importlib.import_module(top)
    for found in pkgutil.walk_packages(modules[top].__path__, f"{top}."):
        modules[found.name] = importlib.import_module(found.name)
print(json.dumps({name: module.__file__ for name, module in modules.items()}))
"""


def pip(*args: str, python: Path | str = sys.executable) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), *args, "--disable-pip-version-check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_pythonpath() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


class Environment:
    """A fresh virtual environment that sees nothing of the one the tests run in."""

    def __init__(self, place: Path):
        venv.create(place, with_pip=False, symlinks=True)
        self.python = place / "bin" / "python"
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        self.modules_at_start = self.run("import sys; print(set(sys.modules))")
        self.empty = self.files()

    def run(self, code: str, quiet: bool = True) -> str:
        done = subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, env=without_pythonpath(), cwd=self.python.parent
        )
        assert done.returncode == 0 and not (quiet and done.stderr), done.stderr
        return done.stdout

    def files(self) -> set[Path]:
        return {path.relative_to(self.site) for path in self.site.rglob("*")}

    def lend(self, package: str) -> Path:
        """Lend what is installed beside this package, as a path whose own start-up lines do not run."""
        lent = self.site / "lent.pth"
        lent.write_text(str(Path(find_spec(package).origin).parents[1]))
        return lent

    def install_editable(self) -> None:
        """Build in here, which has to borrow the builder for that long."""
        lent = self.lend("hatchling")
        pip("install", "-e", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", python=self.python)
        lent.unlink()

    def check_hook(self) -> None:
        self.run(f"started_with = {self.modules_at_start.strip()}\n{HOOKED}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(place))
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "venv")


def test_the_wheel_holds_the_packages_and_the_line_in_its_root(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*PACKAGES, PTH}
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks"))]
    in_checkout = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == in_checkout
    assert {name for name in names if name.endswith("py.typed")} == {f"{package}/py.typed" for package in PACKAGES}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_line_runs_nothing_but_the_hook(wheel):
    line = zipfile.ZipFile(wheel).read(PTH).decode()
    assert line.splitlines() == ["import axolotl_lora_da.bare_name; axolotl_lora_da.bare_name.install()"]


def test_the_metadata_pins_nothing(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = "accelerate peft psutil safetensors torch tqdm transformers".split()
    assert sorted(line.split(">")[0] for line in required) == names
    assert not [line for line in metadata.get_all("Requires-Dist") if "==" in line.split(";")[0] or "<" in line]
    assert metadata["Version"] == lora_da.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"


def test_a_wheel_brings_the_hook_and_leaves_nothing(environment, wheel):
    pip("install", str(wheel), "--no-deps", "--no-index", python=environment.python)
    environment.check_hook()
    pip("uninstall", "-y", "lora-da", python=environment.python)
    assert environment.files() == environment.empty


def test_an_editable_install_brings_the_hook_and_leaves_nothing(environment):
    environment.install_editable()
    environment.check_hook()
    origin = environment.run("import lora_da.config; print(lora_da.config.__file__)")
    assert Path(origin.strip()) == ROOT / "lora_da" / "config.py"
    pip("uninstall", "-y", "lora-da", python=environment.python)
    assert environment.files() == environment.empty


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_every_module_is_found_from_outside_the_checkout(environment, wheel, kind):
    if kind == "wheel":
        pip("install", str(wheel), "--no-deps", "--no-index", python=environment.python)
    else:
        environment.install_editable()
    assert "--load-in-4bit" in environment.run("import sys, lora_da.__main__ as m; sys.argv[1:] = ['--help']; m.main()")
    environment.lend("torch")
    packages = PACKAGES if find_spec("axolotl") else PACKAGES - {"axolotl_lora_da"}  # a plugin needs its host
    shown = environment.run(f"packages = {sorted(packages)}\n{USED}", quiet=False)
    found = {name: Path(file) for name, file in json.loads(shown.splitlines()[-1]).items()}
    files = [path.relative_to(ROOT) for package in packages for path in (ROOT / package).rglob("*.py")]
    origin = environment.site if kind == "wheel" else ROOT
    assert set(found.values()) == {origin / path for path in files}
    assert set(found) == {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}


@pytest.mark.axolotl
@pytest.mark.skipif(find_spec("axolotl") is None, reason="Axolotl is not installed")
def test_installed_beside_axolotl_the_bare_name_resolves_and_no_version_moves(environment, wheel):
    environment.lend("axolotl")  # without its start-up lines: the hook can only be the wheel's
    before = pip("freeze", python=environment.python)
    pip("install", str(wheel), "--no-index", python=environment.python)
    after = set(pip("freeze", python=environment.python).splitlines()) - set(before.splitlines())
    assert [line.split(" ")[0] for line in after] == ["lora-da"]
    kind = environment.run(
        "from axolotl.integrations.base import load_plugin; print(type(load_plugin('lora_da')).__name__)", quiet=False
    )
    assert kind.split()[-1] == "LoraDAPlugin"
