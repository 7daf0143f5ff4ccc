"""The table of what works with what is what the tests show."""

from __future__ import annotations

import pytest
from compatibility import ROWS
from table import PAGE, keys_of, sources, states, table, written

pytestmark = pytest.mark.once

ALL = [row for rows in ROWS.values() for row in rows]


def test_the_page_holds_the_table_of_the_markers() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page, table(states(map(keys_of, sources().values())))), "run `make table`"


@pytest.mark.parametrize("file", sources())
def test_markers_name_rows(file: str) -> None:
    found = keys_of(sources()[file])
    assert found["compat"] | found["refused"] <= {row.key for row in ALL}


def test_keys_are_told_apart() -> None:
    assert len({row.key for row in ALL}) == len(ALL)


@pytest.mark.parametrize(
    "source",
    [
        '@pytest.mark.compat("a", "b")\ndef test_x(): ...',
        'pytestmark = [pytest.mark.slow, pytest.mark.compat("a", "b")]',
        'CASES = [pytest.param(1, marks=[pytest.mark.compat("a"), pytest.mark.compat("b")])]',
        'class TestX:\n    @pytest.mark.compat("b")\n    @pytest.mark.compat("a")\n    def test_x(self): ...',
        'if False:\n    @pytest.mark.compat("a", "b")\n    def test_x(): ...',
    ],
)
def test_markers_are_found_without_running_anything(source: str) -> None:
    assert keys_of(source) == {"compat": {"a", "b"}, "refused": set()}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("@pytest.mark.compat(KEY)\ndef test_x(): ...", "plain strings"),
        ("@pytest.mark.refused()\ndef test_x(): ...", "plain strings"),
        ('@pytest.mark.compat("a")\ndef helper(): ...', "stands at a test"),
        ('tested = pytest.mark.compat("a")', "stands at a test"),
    ],
)
def test_a_marker_that_shows_nothing_is_an_error(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keys_of(source)


def test_a_test_that_does_it_outweighs_one_that_refuses_a_part() -> None:
    does, refuses = {"compat": {"a"}, "refused": set()}, {"compat": set(), "refused": {"a", "b"}}
    assert states([does, refuses]) == states([refuses, does]) == {"a": "tested", "b": "refused"}


def test_a_row_without_a_test_says_why() -> None:
    shown = {row.key: "tested" for row in ALL}
    del shown["float32"]
    with pytest.raises(ValueError, match="no test carries 'float32'"):
        table(shown)
    del shown["cuda"]
    assert "| CUDA | untested: all tests run on CPUs |" in table({**shown, "float32": "tested"})
