"""How much memory there is and how much was used."""

from __future__ import annotations

import re
import sys

import psutil
import torch

GIB = 2**30


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a device, the caching allocator's own reserve included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def used_bytes(device: torch.device) -> int:
    """What this process holds: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


# Besides torch's own error: what CUDA's libraries, pinned allocations and the CPU's allocator say.
OUT_OF_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory", re.IGNORECASE)


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
