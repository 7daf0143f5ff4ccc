"""How much memory there is and how much was used.

An accelerator is asked by the module that torch has for it, `torch.cuda` or `torch.xpu`. What is CUDA's alone, and left
out elsewhere: the gaps in the allocator's statistics, products of 16 bits that return float32 (`products`), and the
precision of float32 products, which XPU and MPS compute in float32 as they are set. Where torch counts no memory, as on
MPS, which shares the machine's, an accelerator is planned for as the CPU is, and copies and clocks are the host's.
"""

from __future__ import annotations

import gc
import re
import sys

import psutil
import torch

from lora_da.containers import free_in_container

GIB = 2**30


def counts_memory(device: torch.device) -> bool:
    """Whether torch counts what is allocated on a device and knows what is free there, as of CUDA's and XPU's."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "mem_get_info")


def is_host(device: torch.device) -> bool:
    """Whether a device's memory is the machine's: the CPU's, MPS's, and that of a GPU that shares it (Jetson, GB10)."""
    if not counts_memory(device):
        return True
    properties = torch.get_device_module(device).get_device_properties(device)
    return bool(getattr(properties, "is_integrated", False))


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a device, the whole blocks that the caching allocator holds included.

    On a GPU a cap on this process counts (`set_per_process_memory_fraction`), where it can be asked for, and gaps
    between what is allocated do not. A GPU that shares the machine's memory, and the CPU, have what the machine and
    this process's container leave.
    """
    host = int(psutil.virtual_memory().available)
    contained = free_in_container()
    host = host if contained is None else min(host, contained)
    if not counts_memory(device):
        return host
    gpu = torch.get_device_module(device)
    free, total = gpu.mem_get_info(device)
    reserved = gpu.memory_reserved(device)
    share = getattr(gpu, "get_per_process_memory_fraction", None)  # not in every torch
    capped = int(total * (1.0 if share is None else share(device))) - reserved
    gaps = gpu.memory_stats(device).get("inactive_split_bytes.all.current", 0)
    room = min(host if is_host(device) else free, capped)
    return max(0, room + reserved - gpu.memory_allocated(device) - gaps)


def settle(device: torch.device) -> None:
    """Let a GPU's free memory tell what can be had: garbage is collected, and whole blocks are given back.

    What its libraries take for themselves at the first product and the first decomposition is taken before.
    """
    if counts_memory(device):
        one = torch.eye(2, device=device)
        torch.linalg.cholesky(one @ one)
        release(device)


def release(device: torch.device) -> None:
    """Give back a GPU's memory that nobody uses."""
    if device.type != "cpu":
        gc.collect()
        torch.get_device_module(device).empty_cache()


def used_bytes(device: torch.device) -> int:
    """What this process holds: on the GPU, or resident on the CPU."""
    if counts_memory(device):
        return int(torch.get_device_module(device).memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


# Besides torch's own error: what CUDA's libraries, pinned allocations and the CPU's allocator say. A library without
# room for its handle, which is made at its first call, says no more than that it could not make it.
OUT_OF_MEMORY = re.compile(
    r"out of memory|ALLOC_FAILED|can't allocate memory|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|CU(BLAS|SOLVER)_STATUS_\w+,? when calling `cu(blas|solver)\w*Create\(",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


class PeakMemory:
    """Peak memory since this object was made: of the GPU where the model is on one, else of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if counts_memory(device):
            torch.get_device_module(device).reset_peak_memory_stats(device)

    @property
    def name(self) -> str:
        return "GPU" if counts_memory(self._device) else "process"

    def gib(self) -> float:
        if counts_memory(self._device):
            return float(torch.get_device_module(self._device).max_memory_allocated(self._device)) / GIB
        if sys.platform == "win32":
            return float(psutil.Process().memory_info().peak_wset) / GIB
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
