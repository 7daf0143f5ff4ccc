"""How much memory is free: in containers, on a GPU under a cap, with gaps, or one that shares the machine's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import lora_da.memory
from lora_da.containers import free_in_container
from lora_da.memory import GIB, free_bytes, is_host, is_out_of_memory, release, settle
from lora_da.processes import Processes

pytestmark = pytest.mark.once

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


def plant(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


def group(folder: str, limit: Any, used: int, cache: int = 0) -> dict[str, Any]:
    """One of version 2."""
    top = f"sys/fs/cgroup/{folder}"
    stat = f"anon 5\nfile 9\ninactive_file {cache}\nactive_file 4"
    return {f"{top}memory.max": limit, f"{top}memory.current": used, f"{top}memory.stat": stat}


def old_group(folder: str, limit: Any, used: int, cache: int = 0) -> dict[str, Any]:
    """One of version 1."""
    top = f"sys/fs/cgroup/memory/{folder}"
    stat = f"inactive_file 1\ntotal_inactive_file {cache}"
    return {f"{top}memory.limit_in_bytes": limit, f"{top}memory.usage_in_bytes": used, f"{top}memory.stat": stat}


SELF = "proc/self/cgroup"
OLD = "5:cpu,cpuacct:/pod/a\n4:memory:/pod/a\n0::/elsewhere"
CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "none": ({}, None),
    "no limit": ({SELF: "0::/a", **group("a/", "max", 7)}, None),
    "its own": ({SELF: "0::/a", **group("a/", 100, 60)}, 40),
    "page cache is free": ({SELF: "0::/a", **group("a/", 100, 60, cache=25)}, 65),
    "more is used than allowed": ({SELF: "0::/a", **group("a/", 100, 130)}, 0),
    "the outer one is smaller": ({SELF: "0::/a/b", **group("a/b/", 100, 60), **group("a/", 120, 110)}, 10),
    "the inner one is smaller": ({SELF: "0::/a/b", **group("a/b/", 100, 95), **group("a/", 120, 100)}, 5),
    "only the outer one has a limit": ({SELF: "0::/a/b", **group("a/b/", "max", 60), **group("a/", 120, 110)}, 10),
    "inside a container": ({SELF: "0::/", **group("", 100, 60)}, 40),
    "inside, by the machine's path": ({SELF: "0::/docker/3f", **group("", 100, 60)}, 40),
    "version 1": ({SELF: OLD, **old_group("pod/a/", 100, 60, cache=9), **old_group("", UNLIMITED, 500)}, 49),
    "version 1, the outer one": ({SELF: OLD, **old_group("pod/a/", UNLIMITED, 60), **old_group("pod/", 90, 60)}, 30),
    "version 1, inside": ({SELF: "4:memory:/docker/3f", **old_group("", 100, 60)}, 40),
    "both": ({SELF: OLD, **old_group("pod/a/", 100, 60), **group("elsewhere/", 100, 90)}, 10),
    "nothing to read": ({SELF: "0::/a", "sys/fs/cgroup/a/memory.max": 100}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_container_leaves(case: str, tmp_path: Path) -> None:
    files, expected = CASES[case]
    assert free_in_container(plant(tmp_path, files)) == expected


def test_the_cpu_has_the_least_of_machine_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    for contained, expected in ((None, 8), (3 * GIB, 3), (20 * GIB, 8)):
        monkeypatch.setattr(lora_da.memory, "free_in_container", lambda contained=contained: contained)
        assert free_bytes(CPU) == expected * GIB


class Card:
    """A GPU of 24 GiB of which other processes use 2, and this one's allocator holds some."""

    def __init__(self, patch: pytest.MonkeyPatch, **figures: Any) -> None:
        self.reserved, self.allocated, self.gaps = 0, 0, 0
        self.share, self.integrated, self.calls = 1.0, False, list[str]()
        vars(self).update(figures)
        stubs = {
            "mem_get_info": lambda device: (22 * GIB - self.reserved, 24 * GIB),
            "memory_reserved": lambda device: self.reserved,
            "memory_allocated": lambda device: self.allocated,
            "memory_stats": lambda device: {"inactive_split_bytes.all.current": self.gaps},
            "get_per_process_memory_fraction": lambda device: self.share,
            "get_device_properties": lambda device: SimpleNamespace(is_integrated=int(self.integrated)),
            "empty_cache": lambda: self.calls.append("emptied"),
        }
        for name, stub in stubs.items():
            patch.setattr(torch.cuda, name, stub)
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=30 * GIB))
        patch.setattr(lora_da.memory, "free_in_container", lambda: None)
        patch.setattr(lora_da.memory.gc, "collect", lambda: self.calls.append("collected"))


@pytest.mark.parametrize(
    ("figures", "free"),
    [
        ({}, 22),
        ({"reserved": 10 * GIB, "allocated": 7 * GIB}, 15),
        ({"reserved": 10 * GIB, "allocated": 7 * GIB, "gaps": GIB}, 14),
        ({"share": 0.5}, 12),
        ({"share": 0.5, "reserved": 10 * GIB, "allocated": 7 * GIB}, 5),
        ({"share": 0.5, "reserved": 10 * GIB, "allocated": 7 * GIB, "gaps": GIB}, 4),
        ({"share": 0.25, "reserved": 10 * GIB, "allocated": 7 * GIB}, 0),
    ],
)
def test_what_is_free_on_a_gpu(figures: dict[str, Any], free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, **figures)
    assert free_bytes(GPU) == free * GIB
    assert not is_host(GPU) and is_host(CPU)


def test_a_gpu_that_shares_the_machines_memory_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver counts page cache as used, the machine as free; processes have a part of it each."""
    Card(monkeypatch, integrated=True, reserved=10 * GIB, allocated=7 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=13 * GIB))
    assert is_host(GPU) and free_bytes(GPU) == (13 + 10 - 7) * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Processes().free_bytes(GPU) == free_bytes(GPU) // 2


def test_what_nobody_uses_is_given_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries' own memory is taken before, and what it took to have it taken goes too."""
    card, eye = Card(monkeypatch), torch.eye
    cholesky, product = torch.linalg.cholesky, torch.Tensor.__matmul__
    monkeypatch.setattr(torch, "eye", lambda n, device: card.calls.append(str(device)) or eye(n))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: card.calls.append("product") or product(a, b))
    monkeypatch.setattr(torch.linalg, "cholesky", lambda a: card.calls.append("decomposition") or cholesky(a))
    settle(GPU)
    assert card.calls == ["cuda:0", "product", "decomposition", "collected", "emptied"]
    card.calls.clear()
    settle(CPU)
    release(CPU)
    assert card.calls == []


SUGGESTION = "If you keep seeing this error, you may use `torch.backends.cuda.preferred_linalg_library()`"
OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasLtCreate(handle)`",
    f"cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXgeqrf(handle)`. {SUGGESTION}",
    f"cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`. {SUGGESTION}",
    f"cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`. {SUGGESTION}",
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
]
OTHER = [
    "CUDA error: device-side assert triggered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
    "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasSgemm(handle)`",
    f"cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXsyevd(handle)`. {SUGGESTION}",
    "mat1 and mat2 shapes cannot be multiplied",
]


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_what_says_that_memory_ran_out(message: str) -> None:
    """In the words of torch's sources: `TORCH_CUDABLAS_CHECK` and `TORCH_CUSOLVER_CHECK`."""
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", OTHER)
def test_what_says_something_else(message: str) -> None:
    assert not is_out_of_memory(RuntimeError(message))
