"""The most bytes of tensors that are alive at once while something runs on the CPU, beyond those before."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def most_live_bytes(run: Callable[[], object]) -> int:
    """By every allocation and release that torch's allocator reports, workspaces of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    events = sorted((e for e in recorded.events() if e.name == "[memory]"), key=lambda e: e.time_range.start)
    del kept
    return max(accumulate((e.cpu_memory_usage for e in events), initial=0))
