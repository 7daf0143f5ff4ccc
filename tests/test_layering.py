"""Which part may know which: read from the sources, so that it holds for code no test runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from layering import Attributes, Imports, Knows, NoGlobals, StandardLibrary, broken

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
PRODUCT = ("lora_da/*", "axolotl_lora_da/*", "trl_integration/*")

# What each room of the core may name of it, beside itself; a room that is not here may not be.
BELOW = {
    "samples": ("lora_da.errors",),
    "model": ("lora_da.samples", "lora_da.memory", "lora_da.errors"),
    "adapter": ("lora_da.model", "lora_da.errors"),
    "tasks": ("lora_da.model", "lora_da.samples", "lora_da.errors"),
    "methods": ("lora_da.statistics", "lora_da.needs", "lora_da.errors"),
    "collect": (
        *("lora_da.tasks", "lora_da.model", "lora_da.samples", "lora_da.adapter", "lora_da.processes"),
        *("lora_da.statistics", "lora_da.products", "lora_da.needs", "lora_da.memory", "lora_da.errors"),
    ),
    "cache": (
        *("lora_da.solution", "lora_da.adapter", "lora_da.config", "lora_da.report", "lora_da.samples"),
        *("lora_da.tasks", "lora_da.model", "lora_da.errors", "lora_da.__version__"),
    ),
    "doctor": (
        *("lora_da.findings", "lora_da.tasks", "lora_da.model", "lora_da.samples", "lora_da.memory"),
        "lora_da.errors",
    ),
    "export": (
        *("lora_da.initialize", "lora_da.config", "lora_da.processes", "lora_da.report", "lora_da.samples"),
        *("lora_da.tasks", "lora_da.errors"),
    ),
}
# The same of single files.
BELOW_FILES = {
    "needs": (),
    "findings": (),
    "products": ("lora_da.memory",),
    "statistics": ("lora_da.needs", "lora_da.products"),
    "config": ("lora_da.methods", "lora_da.needs", "lora_da.errors"),
    "processes": ("lora_da.model", "lora_da.memory", "lora_da.errors"),
    "solve": (
        *("lora_da.collect.handover", "lora_da.methods", "lora_da.adapter", "lora_da.model.weights"),
        *("lora_da.samples", "lora_da.statistics", "lora_da.products", "lora_da.memory", "lora_da.errors"),
    ),
    "solution": (
        *("lora_da.collect", "lora_da.methods", "lora_da.adapter", "lora_da.report", "lora_da.samples"),
        *("lora_da.statistics", "lora_da.needs", "lora_da.errors"),
    ),
    "first_step": (
        *("lora_da.solution", "lora_da.adapter", "lora_da.report", "lora_da.processes", "lora_da.methods.method"),
        *("lora_da.tasks", "lora_da.model", "lora_da.samples", "lora_da.memory", "lora_da.errors"),
    ),
}

RULES = (
    Imports(
        "the core knows no host",
        ("lora_da/*",),
        ("axolotl", "trl", "pydantic", "axolotl_lora_da", "trl_integration"),
    ),
    *(
        Knows(f"the room {room} knows what is below it", (f"lora_da/{room}/*",), "lora_da", (f"lora_da.{room}", *below))
        for room, below in BELOW.items()
    ),
    *(
        Knows(f"{name} knows what is below it", (f"lora_da/{name}.py",), "lora_da", below)
        for name, below in BELOW_FILES.items()
    ),
    Imports(
        "a method sees tensors and numbers only",
        ("lora_da/methods/*",),
        ("torch.nn", "torch.distributed", "torch.utils.hooks", "peft", "transformers", "bitsandbytes"),
    ),
    Attributes("a method sees tensors and numbers only", ("lora_da/methods/*",), r"register_(\w+_)?hook"),
    Imports("one host does not know the other", ("axolotl_lora_da/*",), ("trl", "trl_integration")),
    Imports("one host does not know the other", ("trl_integration/*",), ("axolotl", "axolotl_lora_da")),
    Imports("Unsloth is told by names, not imported", PRODUCT, ("unsloth", "unsloth_zoo")),
    Imports("the product runs without what surrounds it", PRODUCT, ("tests", "oracle", "examples", "benchmarks")),
    Imports(
        "the oracle does not know what it judges",
        ("tests/support/oracle.py", "tests/support/method_oracles.py", "tests/support/expert_oracle.py"),
        ("lora_da", "axolotl_lora_da", "trl_integration"),
    ),
    Imports(
        "only the adapter knows PEFT's layers",
        PRODUCT,
        ("peft.tuners",),
        but=("lora_da/adapter/find.py", "lora_da/adapter/stacks.py"),
    ),
    Attributes(
        "hooks belong to the estimation",
        PRODUCT,
        r"register_(\w+_)?hook",
        but=("lora_da/collect/collector.py", "lora_da/collect/selection.py", "lora_da/model/gradients.py"),
    ),
    Attributes("only the adapter writes", PRODUCT, r"copy_", but=("lora_da/adapter/layer.py",)),
    Attributes("only the adapter writes", PRODUCT, r"data", but=("lora_da/adapter/layer.py",), set_only=True),
    StandardLibrary("the start-up hook is standard library", ("axolotl_lora_da/__init__.py", "*/bare_name.py")),
    StandardLibrary(
        "a config loads without torch",
        (
            *("lora_da/__init__.py", "lora_da/config.py", "lora_da/errors.py", "lora_da/needs.py"),
            *("lora_da/methods/__init__.py", "lora_da/methods/method.py", "lora_da/methods/presets.py"),
        ),
        ("lora_da.errors", "lora_da.needs", "lora_da.methods"),
    ),
    NoGlobals("no state in modules", PRODUCT),
    Imports("what tests share lives in tests/support", ("tests/*",), ("test_*", "*.test_*")),
)


def violations(sources: dict[str, str]) -> list[str]:
    return [line for path, source in sources.items() for rule in RULES for line in broken(rule, path, source)]


def test_every_part_knows_only_what_it_may():
    product = {pattern.split("/")[0] for pattern in PRODUCT}
    files = [path for top in (*product, "tests") for path in (ROOT / top).rglob("*.py")]
    assert {path.relative_to(ROOT).parts[0] for path in files} == {*product, "tests"}
    assert violations({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}) == []


def test_every_room_has_its_rule():
    assert {path.name for path in (ROOT / "lora_da").iterdir() if (path / "__init__.py").exists()} == set(BELOW)


def test_relative_imports_are_not_used():
    """The rules read full names."""
    files = [path for top in PRODUCT for path in ROOT.glob(top.replace("*", "**/*.py"))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


PLANTED = [
    ("lora_da/adapter/find.py", "import axolotl.utils", "the core knows no host"),
    ("lora_da/x.py", "def f():\n    from trl import SFTTrainer", "the core knows no host"),
    ("lora_da/x.py", "import importlib\nimportlib.import_module('pydantic')", "the core knows no host"),
    ("lora_da/methods/x.py", "from torch import nn", "a method sees tensors and numbers only"),
    ("lora_da/methods/x.py", "import torch\ny = torch.nn.functional.relu", "a method sees tensors and numbers only"),
    ("lora_da/methods/x.py", "import torch as t\nt.distributed.barrier()", "a method sees tensors and numbers only"),
    ("lora_da/methods/x.py", "from peft import LoraConfig", "a method sees tensors and numbers only"),
    ("lora_da/methods/x.py", "from lora_da.config import Preset", "the room methods knows"),
    ("lora_da/methods/x.py", "from lora_da import config", "the room methods knows"),
    ("lora_da/methods/x.py", "import lora_da.collect", "the room methods knows"),
    ("lora_da/samples/x.py", "from lora_da.model.state import estimation_mode", "the room samples knows"),
    ("lora_da/samples/draw.py", "from lora_da.tasks import Task", "the room samples knows"),
    ("lora_da/model/x.py", "from lora_da.tasks.head import LossPass", "the room model knows"),
    ("lora_da/model/x.py", "import lora_da\nlora_da.adapter.find_adapter", "the room model knows"),
    ("lora_da/tasks/x.py", "from lora_da.collect.plan import Plan", "the room tasks knows"),
    ("lora_da/collect/x.py", "from lora_da.methods import METHODS", "the room collect knows"),
    ("lora_da/collect/__init__.py", "def f():\n    from lora_da.solve import LayerSolver", "the room collect knows"),
    ("lora_da/cache/x.py", "from lora_da.initialize import initialize_lora_da_weights", "the room cache knows"),
    ("lora_da/doctor/x.py", "from lora_da.collect import collect", "the room doctor knows"),
    ("lora_da/export/x.py", "from lora_da.collect import collect", "the room export knows"),
    ("lora_da/needs.py", "from lora_da.statistics import LayerStatistics", "needs knows what is below it"),
    ("lora_da/first_step.py", "from lora_da.collect import Plan", "first_step knows what is below it"),
    ("lora_da/products.py", "from lora_da.statistics import LayerSums", "products knows what is below it"),
    ("lora_da/statistics.py", "from lora_da.processes import Processes", "statistics knows what is below it"),
    ("lora_da/findings.py", "from lora_da.doctor.rows import look_at", "findings knows what is below it"),
    ("lora_da/config.py", "from lora_da.adapter import Adapter", "config knows what is below it"),
    ("lora_da/adapter/x.py", "from lora_da.processes import Processes", "the room adapter knows what is below it"),
    ("lora_da/processes.py", "from lora_da.collect import collect", "processes knows what is below it"),
    ("lora_da/solve.py", "from lora_da.collect.schedule import Schedule", "solve knows what is below it"),
    ("lora_da/solution.py", "from lora_da.cache import CacheEntry", "solution knows what is below it"),
    ("lora_da/methods/x.py", "x.register_hook(print)", "a method sees tensors and numbers only"),
    ("axolotl_lora_da/plugin.py", "import trl_integration", "one host does not know the other"),
    ("axolotl_lora_da/plugin.py", "import trl", "one host does not know the other"),
    ("trl_integration/x.py", "from axolotl_lora_da.plugin import LoraDAPlugin", "one host does not know the other"),
    ("lora_da/model/x.py", "from unsloth.models import llama", "Unsloth is told by names, not imported"),
    ("trl_integration/x.py", "def f():\n    import unsloth_zoo", "Unsloth is told by names, not imported"),
    ("lora_da/x.py", "from examples import demo", "the product runs without what surrounds it"),
    ("trl_integration/x.py", "import tests.oracle", "the product runs without what surrounds it"),
    (
        "tests/support/oracle.py",
        "from lora_da.statistics import LayerStatistics",
        "the oracle does not know what it judges",
    ),
    ("tests/support/method_oracles.py", "import lora_da.methods.filet", "the oracle does not know what it judges"),
    ("lora_da/collect/collector.py", "from peft.tuners.lora import LoraLayer", "only the adapter knows PEFT's layers"),
    ("lora_da/model/state.py", "import peft\npeft.tuners.lora", "only the adapter knows PEFT's layers"),
    ("lora_da/model/state.py", "model.register_forward_pre_hook(f)", "hooks belong to the estimation"),
    ("axolotl_lora_da/kernels.py", "x.register_full_backward_hook(f)", "hooks belong to the estimation"),
    ("lora_da/initialize.py", "weight.copy_(x)", "only the adapter writes"),
    ("lora_da/initialize.py", "weight.data = x", "only the adapter writes"),
    ("axolotl_lora_da/bare_name.py", "import yaml", "the start-up hook is standard library"),
    ("axolotl_lora_da/__init__.py", "from lora_da import config", "the start-up hook is standard library"),
    ("lora_da/config.py", "from lora_da.adapter import Adapter", "a config loads without torch"),
    ("lora_da/__init__.py", "import torch", "a config loads without torch"),
    ("lora_da/methods/__init__.py", "import torch", "a config loads without torch"),
    ("trl_integration/x.py", "def f():\n    global state", "no state in modules"),
    ("tests/cache/test_x.py", "from test_rows import WORDS", "what tests share lives in tests/support"),
    ("tests/support/x.py", "def f():\n    import test_rows", "what tests share lives in tests/support"),
    ("tests/test_x.py", "from tests.export import test_rows", "what tests share lives in tests/support"),
    ("tests/test_x.py", "from tests.export.test_rows import WORDS", "what tests share lives in tests/support"),
]


@pytest.mark.parametrize(("path", "source", "rule"), PLANTED)
def test_a_planted_violation_is_found(path, source, rule):
    assert any(rule in found for found in violations({path: source})), violations({path: source})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name} in {rule.where[0]}")
def test_every_rule_can_fail(rule):
    assert any(broken(rule, path, source) for path, source, _ in PLANTED)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lora_da/adapter/find.py", "from peft.tuners.lora import LoraLayer"),
        ("lora_da/adapter/layer.py", "weight.copy_(x)"),
        ("lora_da/collect/collector.py", "layer.register_forward_hook(f)"),
        ("lora_da/model/gradients.py", "layer.register_forward_hook(f)"),
        ("axolotl_lora_da/plugin.py", "from axolotl.integrations.base import BasePlugin\nimport lora_da.errors"),
        ("axolotl_lora_da/__init__.py", "def f():\n    from axolotl_lora_da.plugin import LoraDAPlugin"),
        ("lora_da/methods/x.py", "import torch\nfrom lora_da.statistics import LayerStatistics\nx = batch.data"),
        ("lora_da/methods/__init__.py", "from lora_da.methods.method import Method\nfrom lora_da.needs import Needs"),
        ("lora_da/collect/x.py", "from lora_da.collect.plan import Plan\nfrom lora_da.tasks import Task"),
        ("lora_da/initialize.py", "from lora_da.collect import collect\nfrom lora_da.methods import METHODS"),
        ("lora_da/x.py", "import trlx\nname = 'trl'"),
        ("tests/test_x.py", "import axolotl, trl, lora_da, testing\nfrom peft.tuners.lora import LoraLayer"),
    ],
)
def test_what_is_allowed_is_not_found(path, source):
    assert violations({path: source}) == []
