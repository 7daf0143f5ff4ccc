"""Kinds of rules about what a source file may name, judged on its syntax tree."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class Imports:
    """No file of `where` but those of `but` names a module of `never`, by import or as an attribute of one.

    `*` in a name of `never` stands for anything.
    """

    name: str
    where: tuple[str, ...]
    never: tuple[str, ...]
    but: tuple[str, ...] = ()

    def broken(self, tree: ast.Module) -> Iterator[tuple[int, str]]:
        for line, name in modules_named(tree):
            if any(fnmatch(name, pattern) for module in self.never for pattern in (module, f"{module}.*")):
                yield line, name


@dataclass(frozen=True)
class Knows:
    """The files of `where` name these modules of the package `own` only, and what is in them."""

    name: str
    where: tuple[str, ...]
    own: str
    only: tuple[str, ...]
    but: tuple[str, ...] = ()

    def broken(self, tree: ast.Module) -> Iterator[tuple[int, str]]:
        for line, name in modules_named(tree):
            inside = name.startswith(f"{self.own}.")
            if inside and not any(name == module or name.startswith(f"{module}.") for module in self.only):
                yield line, name


@dataclass(frozen=True)
class StandardLibrary:
    """At import, the files of `where` import the standard library only, and `besides`."""

    name: str
    where: tuple[str, ...]
    besides: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def broken(self, tree: ast.Module) -> Iterator[tuple[int, str]]:
        at_import = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        for line, name in modules_named(at_import):
            known = name.split(".")[0] in sys.stdlib_module_names
            if not known and not any(name == module or name.startswith(f"{module}.") for module in self.besides):
                yield line, name


@dataclass(frozen=True)
class Attributes:
    """No file of `where` but those of `but` uses an attribute of this name; with `set_only`, sets it."""

    name: str
    where: tuple[str, ...]
    never: str
    but: tuple[str, ...] = ()
    set_only: bool = False

    def broken(self, tree: ast.Module) -> Iterator[tuple[int, str]]:
        for node in ast.walk(tree):
            named = isinstance(node, ast.Attribute) and re.fullmatch(self.never, node.attr)
            if named and (isinstance(node.ctx, ast.Store) or not self.set_only):
                yield node.lineno, node.attr


@dataclass(frozen=True)
class NoGlobals:
    """State lives in objects."""

    name: str
    where: tuple[str, ...]
    but: tuple[str, ...] = ()

    def broken(self, tree: ast.Module) -> Iterator[tuple[int, str]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                yield node.lineno, f"global {', '.join(node.names)}"


Rule = Imports | Knows | StandardLibrary | Attributes | NoGlobals


def broken(rule: Rule, path: str, source: str) -> list[str]:
    if path in rule.but or not any(fnmatch(path, pattern) for pattern in rule.where):
        return []
    return [f"{path}:{line}: {rule.name}: {what}" for line, what in rule.broken(ast.parse(source))]


def modules_named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every dotted name that stands for a module or something in one, aliases resolved."""
    stands_for: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                stands_for[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else ""
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, f"{'.' * node.level}{node.module or ''}"
            for alias in node.names:
                stands_for[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in stands_for:
                yield node.lineno, f"{stands_for[first] or first}.{rest}"
