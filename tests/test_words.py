"""How the code reads: what no docstring begins with, and how many parameters a function has at most."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
PRODUCT = ("axolotl_lora_da", "lora_da", "trl_integration")
READ = (*PRODUCT, "tests", "benchmarks", "examples")
NEVER_FIRST = ("Of", "That", "As", "With")  # a docstring has a verb, or a thing, to begin with
MANY = 7  # parameters that a call can still be read with

Function = ast.FunctionDef | ast.AsyncFunctionDef


def first_words(tree: ast.Module) -> Iterator[str]:
    """Each docstring that begins with a word of `NEVER_FIRST`, behind the line and the name of what it is about."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            text = ast.get_docstring(node) or ""
            if text.split(maxsplit=1)[:1] and text.split(maxsplit=1)[0].rstrip(",:;") in NEVER_FIRST:
                yield f"{getattr(node, 'lineno', 1)}: {getattr(node, 'name', 'the module')}: {text.splitlines()[0]}"


def long_signatures(tree: ast.Module, public: frozenset[str]) -> Iterator[str]:
    """Each function of more than `MANY` parameters, but public ones and the making of public classes."""
    for outer in ast.walk(tree):
        for node in ast.iter_child_nodes(outer):
            if not isinstance(node, Function):
                continue
            of_class = outer.name if isinstance(outer, ast.ClassDef) else None
            if (node.name in public and not of_class) or (node.name == "__init__" and of_class in public):
                continue
            number = parameters(node) - (of_class is not None and not is_static(node))
            if number > MANY:
                yield f"{node.lineno}: {node.name} has {number} parameters"


def parameters(node: Function) -> int:
    of = node.args
    return len(of.posonlyargs + of.args + of.kwonlyargs) + (of.vararg is not None) + (of.kwarg is not None)


def is_static(node: Function) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)


def late_attributes(tree: ast.Module) -> Iterator[str]:
    """Each attribute that an object of a class is given after it was made."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        fields = {ast.unparse(s.target) for s in node.body if isinstance(s, ast.AnnAssign)}
        fields |= {ast.unparse(t) for s in node.body if isinstance(s, ast.Assign) for t in s.targets}
        methods = {f.name: set(own_attributes_set(f)) for f in node.body if isinstance(f, Function)}
        born = fields | {name for name, _ in methods.pop("__init__", set())}
        for name, line in sorted(set().union(*methods.values())):
            if name not in born:
                yield f"{line}: {node.name}.{name} is born outside __init__"


def own_attributes_set(function: Function) -> Iterator[tuple[str, int]]:
    for node in ast.walk(function):
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_set and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr, node.lineno


def public_names() -> frozenset[str]:
    """What the packages' `__all__` list."""
    found: set[str] = set()
    for package in PRODUCT:
        tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found.update(ast.literal_eval(node.value))
    return frozenset(found)


def trees(folders: tuple[str, ...]) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        files = sorted((ROOT / folder).rglob("*.py"))
        assert files, folder
        for path in files:
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_docstrings_say_at_once_what_they_are_about() -> None:
    assert [f"{path}:{found}" for path, tree in trees(READ) for found in first_words(tree)] == []


def test_functions_have_few_parameters() -> None:
    public = public_names()
    assert "initialize_lora_da_weights" in public
    assert [f"{path}:{found}" for path, tree in trees(PRODUCT) for found in long_signatures(tree, public)] == []


def test_objects_have_all_their_attributes_from_the_beginning() -> None:
    folders = (*PRODUCT, "benchmarks")
    assert [f"{path}:{found}" for path, tree in trees(folders) for found in late_attributes(tree)] == []


@pytest.mark.parametrize(
    ("source", "late"),
    [
        ("class C:\n    def f(self):\n        self.x = 1", 1),
        ("class C:\n    def __init__(self):\n        self.y = 0\n    def f(self):\n        self.y, self.x = 1, 2", 1),
        ("class C:\n    x: int = 0\n    z = 1\n    def f(self):\n        self.x = self.z = 1", 0),
        ("class C:\n    def __init__(self):\n        self.x = None\n    def f(self):\n        self.x += 1", 0),
        ("class C:\n    def f(self, other):\n        other.x = 1", 0),
    ],
)
def test_a_planted_attribute_is_found(source: str, late: int) -> None:
    assert len(list(late_attributes(ast.parse(source)))) == late


@pytest.mark.parametrize(
    "source",
    [
        '"""Of a module."""',
        'def f():\n    """That it works."""',
        'class C:\n    """As others do it."""',
        'class C:\n    def f(self):\n        """\n        With, or without: both.\n        """',
        'async def f():\n    def g():\n        """As: nothing."""',
    ],
)
def test_a_planted_beginning_is_found(source: str) -> None:
    assert len(list(first_words(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    [
        '"""Offers, thatched, aside, without."""',
        "def f():\n    pass",
        '"""Run as a module."""',
        'x = "Of a string"',
        '""""""',
    ],
)
def test_other_beginnings_are_not(source: str) -> None:
    assert list(first_words(ast.parse(source))) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f(a, b, c, d, e, f, g, h): ...",
        "def f(a, b, c, d, /, e, *, f, g=1, h=2): ...",
        "def f(a, b, c, d, e, f, *g, **h): ...",
        "class C:\n    def f(self, a, b, c, d, e, f, g, h): ...",
        "class C:\n    def __init__(self, a, b, c, d, e, f, g, h): ...",
        "class C:\n    def known(self, a, b, c, d, e, f, g, h): ...",
        "class C:\n    @staticmethod\n    def f(a, b, c, d, e, f, g, h): ...",
        "def f():\n    async def g(a, b, c, d, e, f, g, h): ...",
    ],
)
def test_a_planted_signature_is_found(source: str) -> None:
    assert len(list(long_signatures(ast.parse(source), frozenset({"known", "Known"})))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def f(a, b, c, d, e, f, g): ...",
        "class C:\n    def f(self, a, b, c, d, e, f, g): ...",
        "def known(a, b, c, d, e, f, g, h): ...",
        "class Known:\n    def __init__(self, a, b, c, d, e, f, g, h): ...",
    ],
)
def test_other_signatures_are_not(source: str) -> None:
    assert list(long_signatures(ast.parse(source), frozenset({"known", "Known"}))) == []
