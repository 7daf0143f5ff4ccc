"""The project's pages: what they show in fences, name in backticks and link to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Fence:
    """What a page shows between two lines of backticks."""

    page: str
    language: str
    code: str


def pages() -> dict[str, str]:
    """Text by path: the README and what it leads to."""
    paths = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def fences(texts: Mapping[str, str]) -> list[Fence]:
    """All that the pages show.

    Raises:
        ValueError: backticks that open or close nothing, or in which something would be overlooked.
    """
    found = []
    for page, text in texts.items():
        here = [Fence(page, language, code) for language, code in FENCE.findall(text)]
        if text.count("```") != 2 * len(here):
            raise ValueError(f"{page}: a fence begins in the first column, with the language alone, and ends")
        found += here
    return found


def commands(shown: Iterable[Fence]) -> Iterator[tuple[str, str]]:
    """Page and line of all that is to be typed into a shell, without comments and settings of the environment."""
    for fence in shown:
        if fence.language == "bash":
            for line in fence.code.replace("\\\n", " ").splitlines():
                typed = re.sub(r"^(export )?(\w+=\S* +)*", "", re.sub(r"\s+#.*", "", line)).strip()
                if typed and not re.fullmatch(r"\w+=\S*", typed):
                    yield fence.page, typed


def dead_links(texts: Mapping[str, str]) -> list[str]:
    """Links into the repository that lead to no file, or to no heading of it."""
    dead = []
    for page, text in texts.items():
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            file, _, anchor = link.partition("#")
            target = (ROOT / page).parent / file if file else ROOT / page
            if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
                dead.append(f"{page}: {link}")
    return dead


def anchors(text: str) -> set[str]:
    """What links call the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(text: str, beginning: str) -> list[list[str]]:
    """The cells of the table whose first line begins like this, without their backticks at both ends."""
    lines = text[text.index(beginning) :].splitlines()
    body = lines[2 : next((i for i, line in enumerate(lines) if not line.strip().startswith("|")), len(lines))]
    return [[cell.strip().strip("`") for cell in line.strip(" |").split("|")] for line in body]
