"""How the code reads: what no docstring begins with, and how many parameters a function has at most."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
PRODUCT = ("axolotl_lora_da", "lora_da", "trl_integration")
READ = ("tests", "benchmarks", "examples", "axolotl_lora_da", "trl_integration")  # for docstrings; lora_da is to follow
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
