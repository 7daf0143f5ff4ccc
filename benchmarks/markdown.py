"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Write a table, its lines and an empty one; no lines at all without rows."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    if not lines:
        return []
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *lines, ""]
