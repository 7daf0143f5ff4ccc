"""How much memory there is and how much was used."""

from __future__ import annotations

import gc
import re
import sys

import psutil
import torch

from lora_da.containers import free_in_container

GIB = 2**30


def is_host(device: torch.device) -> bool:
    """Whether a device's memory is the machine's: the CPU's, and that of a GPU that shares it (Jetson, GB10)."""
    if device.type != "cuda":
        return True
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a device, the whole blocks that the caching allocator holds included.

    On a GPU a cap on this process counts (`set_per_process_memory_fraction`), and gaps between what is allocated do
    not. A GPU that shares the machine's memory, and the CPU, have what the machine and this process's container leave.
    """
    host = int(psutil.virtual_memory().available)
    contained = free_in_container()
    host = host if contained is None else min(host, contained)
    if device.type != "cuda":
        return host
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in every torch
    capped = int(total * (1.0 if share is None else share(device))) - reserved
    gaps = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
    room = min(host if is_host(device) else free, capped)
    return max(0, room + reserved - torch.cuda.memory_allocated(device) - gaps)


def settle(device: torch.device) -> None:
    """Let a GPU's free memory tell what can be had: garbage is collected, and whole blocks are given back.

    What its libraries take for themselves at the first product and the first decomposition is taken before.
    """
    if device.type == "cuda":
        one = torch.eye(2, device=device)
        torch.linalg.cholesky(one @ one)
        release(device)


def release(device: torch.device) -> None:
    """Give back a GPU's memory that nobody uses."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def used_bytes(device: torch.device) -> int:
    """What this process holds: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
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
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def name(self) -> str:
        return "GPU" if self._device.type == "cuda" else "process"

    def gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        if sys.platform == "win32":
            return float(psutil.Process().memory_info().peak_wset) / GIB
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
