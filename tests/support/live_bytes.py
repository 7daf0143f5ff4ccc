"""The most bytes of tensors that are alive at once while something runs on the CPU, beyond those before."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def most_live_bytes(run: Callable[[], object]) -> int:
    """By every allocation and release that torch's allocator reports, workspaces of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    # `recorded.events()` gives what is allocated inside an operation to that operation, and no more says when
    recorded_all = recorded.profiler.kineto_results.events()
    events = sorted((e for e in recorded_all if e.name() == "[memory]"), key=lambda e: e.start_ns())
    del kept
    return max(accumulate((e.nbytes() for e in events), initial=0))
