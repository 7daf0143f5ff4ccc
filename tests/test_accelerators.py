"""Accelerators other than CUDA's are asked by torch's module for them; MPS is planned for as the CPU is."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

import lora_da.memory
from lora_da.collect.borders import Borders
from lora_da.collect.timing import Stopwatch
from lora_da.memory import GIB, PeakMemory, counts_memory, free_bytes, is_host, release, used_bytes

pytestmark = pytest.mark.once

XPU, MPS, CPU = torch.device("xpu:1"), torch.device("mps"), torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """What an XPU of 8 GiB, 3 of which torch has taken and 2 handed out, is asked, and of which of them."""
    found: list[tuple[str, int | None]] = []

    def answering(name: str, answer: object) -> object:
        def answered(device: torch.device | None = None) -> object:
            found.append((name, None if device is None else device.index))
            return answer

        return answered

    answers = {
        "mem_get_info": (5 * GIB, 8 * GIB),
        "memory_reserved": 3 * GIB,
        "memory_allocated": 2 * GIB,
        "max_memory_allocated": 4 * GIB,
        "reset_peak_memory_stats": None,
        "memory_stats": {},
        "get_device_properties": SimpleNamespace(),
        "empty_cache": None,
        "synchronize": None,
        "Stream": "a stream",
    }
    module = SimpleNamespace(**{name: answering(name, answer) for name, answer in answers.items()})
    real = torch.get_device_module
    monkeypatch.setattr(torch, "get_device_module", lambda device: module if device.type == "xpu" else real(device))
    return found


def test_an_xpu_is_asked_for_its_own_memory(asked: list[tuple[str, int | None]]) -> None:
    assert counts_memory(XPU) and not is_host(XPU)
    assert (free_bytes(XPU), used_bytes(XPU)) == (6 * GIB, 2 * GIB)
    peak = PeakMemory(XPU)
    assert (peak.gib(), peak.name) == (4.0, "GPU")
    release(XPU)
    assert Stopwatch(XPU).seconds() == {}
    assert Borders(XPU)._copies == "a stream"
    assert {index for name, index in asked if name != "empty_cache"} == {1}
    assert {"reset_peak_memory_stats", "empty_cache", "synchronize", "Stream"} <= {name for name, _ in asked}


def test_mps_is_planned_for_as_the_cpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_da.memory, "free_in_container", lambda: None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7 * GIB))
    for device in (MPS, CPU):
        assert is_host(device) and not counts_memory(device)
        assert free_bytes(device) == 7 * GIB
        assert PeakMemory(device).name == "process" and Borders(device)._copies is None
        with (watch := Stopwatch(device))("products"):
            pass
        assert watch.seconds()["products"] > 0
