"""Time and peak memory of one piece of work, and what it was measured on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from lora_da.memory import GIB

SAMPLING_SECONDS = 0.02  # between two looks at the resident memory
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lora-da")

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What one piece of work took. Memory in bytes.

    Args:
        seconds: wall time; work queued on the GPU is waited for.
        cpu_peak, cpu_increase: highest resident memory of the process while it ran, and that over the start.
        gpu_peak, gpu_increase: highest allocated GPU memory, and that over the start; None without a GPU.
    """

    seconds: float
    cpu_peak: int
    cpu_increase: int
    gpu_peak: int | None
    gpu_increase: int | None


def measured(work: Callable[[], T], device: torch.device) -> tuple[T, Cost]:
    """Run `work` on memory that was tidied up before: its result and its cost."""
    release_memory()
    on_gpu = device.type == "cuda"
    gpu_start = 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        gpu_start = torch.cuda.memory_allocated(device)
    with _ResidentMemory() as memory:
        started = time.perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    gpu_peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    gpu_increase = None if gpu_peak is None else gpu_peak - gpu_start
    return result, Cost(seconds, memory.peak, memory.peak - memory.start, gpu_peak, gpu_increase)


def release_memory() -> None:
    """Give freed memory back, so that a measurement does not start with what the one before left in the allocators."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class _ResidentMemory:
    """The process's resident memory while the context is open, looked at from a thread."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.start = self.peak = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _ResidentMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLING_SECONDS):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)


def environment(device: torch.device) -> dict[str, Any]:
    """Tell the command, the date, the versions and the hardware: what belongs beside every number."""
    return {
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": {
            "cpu": _cpu_model(),
            "cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "openmp": {name: value for name, value in os.environ.items() if name.startswith("OMP_")},
            "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "gpu": _gpu(device),
        },
    }


def _module() -> str:
    """Name what was started: a module of this package, or a package in it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"benchmarks.{Path(sys.argv[0]).stem}" if spec is None else spec.name
    return name.removesuffix(".__main__")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "cuda": torch.version.cuda,
        "driver": driver.read_text(encoding="utf-8").splitlines()[0] if driver.exists() else None,
    }
