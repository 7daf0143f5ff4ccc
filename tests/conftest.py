"""What every test runs under."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_finish() -> None:
    """Take what importing has made, half a million objects, out of the garbage collector's sight.

    Trainers collect garbage when they begin; over all that this takes longer than a tiny model's training.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give it back: libraries in C++ count what is left when Python ends."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what tests have counted (`record_property`), whichever process they ran in."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {name}: {value}")
