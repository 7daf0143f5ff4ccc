"""The benchmarks' commands tell in one sentence what whoever runs them got wrong."""

from pathlib import Path

import pytest

from benchmarks.command import run
from benchmarks.errors import BenchmarkError

pytestmark = pytest.mark.once

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMANDS = [path for path in sorted(BENCHMARKS.rglob("*.py")) if '__name__ == "__main__"' in path.read_text()]


def test_an_error_of_theirs_is_told_in_a_sentence():
    def main() -> None:
        raise BenchmarkError("there is no file")

    with pytest.raises(SystemExit, match="error: there is no file"):
        run(main)


def test_no_other_error_is_hidden():
    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run(main)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(BENCHMARKS).as_posix())
def test_every_command_ends_so(path):
    assert path.read_text().endswith('if __name__ == "__main__":\n    run(main)\n')


def test_commands_are_found():
    assert {path.name for path in COMMANDS} == {
        *(
            "__main__.py",
            "curves.py",
            "first_length.py",
            "init_cost.py",
            "planted_faults.py",
            "report.py",
            "sample_size.py",
            "step_length.py",
        ),
    }
