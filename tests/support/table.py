"""`make table`: writes the table of what works with what, docs/compatibility.md, from the markers of the tests.

Standard library only, and the tests are read as text: those that a stack skips count as well, they run in the other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from compatibility import ROWS, Row

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by `make table` -->", "<!-- end of what `make table` writes -->"
MARKERS = {"compat": "tested", "refused": "refused"}


def sources() -> dict[str, str]:
    """The tests, by path."""
    tests = Path(__file__).parents[1]
    return {
        path.relative_to(tests).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(tests.rglob("test_*.py"))
    }


def keys_of(source: str) -> dict[str, set[str]]:
    """The keys that a file's tests carry, by marker.

    Raises:
        ValueError: a marker without literal keys, or where it marks no test.
    """
    tree, found = ast.parse(source), {marker: set() for marker in MARKERS}
    on_tests = {id(call) for place in _places(tree) for call in _marker_calls(place)}
    for call in _marker_calls(tree):
        literal = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if not literal or len(literal) != len(call.args) or call.keywords:
            raise ValueError(f"line {call.lineno}: a marker takes the keys of its rows, as plain strings")
        if id(call) not in on_tests:
            raise ValueError(f"line {call.lineno}: a marker stands at a test, a `pytest.param` or a `pytestmark`")
        found[call.func.attr].update(literal)
    return found


def states(keys: Iterable[dict[str, set[str]]]) -> dict[str, str]:
    """What the tests of each key show: one that does it outweighs one that refuses a part of it."""
    shown: dict[str, str] = {}
    for found in keys:
        shown |= {key: MARKERS["refused"] for key in found["refused"] if key not in shown}
        shown |= dict.fromkeys(found["compat"], MARKERS["compat"])
    return shown


def table(shown: dict[str, str]) -> str:
    """The Markdown."""
    lines = ["| | | |", "|---|---|---|"]
    for group, rows in ROWS.items():
        for number, row in enumerate(rows):
            lines.append(f"| {f'**{group}**' if number == 0 else ''} | {row.text} | {_state(row, shown)} |")
    return "\n".join(lines)


def written(page: str, rows: str) -> str:
    """The page with these rows in their place."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{rows}\n\n{END}{after}"


def _state(row: Row, shown: dict[str, str]) -> str:
    if row.key in shown:
        return shown[row.key]
    if not row.untested:
        raise ValueError(f"no test carries {row.key!r}, and its row does not say why")
    return f"untested: {row.untested}"


def _places(tree: ast.Module) -> Iterator[ast.AST]:
    """Where pytest reads marks."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets):
            yield node.value
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield from node.decorator_list
        elif isinstance(node, ast.keyword) and node.arg == "marks":
            yield node.value


def _marker_calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in MARKERS and ast.unparse(called.value) == "pytest.mark":
            yield node


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(written(page, table(states(map(keys_of, sources().values())))), encoding="utf-8")
