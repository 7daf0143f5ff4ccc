"""torch as it looks where there are the GPUs of `fake_gpu`: what tensors say of themselves, and `torch.cuda`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gpu import CPU, FakeGpus
from torch import Tensor

GIB = 2**30


@contextmanager
def fake_gpus(n: int = 1, memory: int = 8 * GIB) -> Iterator[FakeGpus]:
    """`n` GPUs of `memory` bytes each, while the context is open. Tensors that are still on one afterwards are on the
    CPU again."""
    gpus = FakeGpus(n, memory)
    with pytest.MonkeyPatch.context() as patch:
        _of_tensors(patch, gpus)
        _of_cuda(patch, gpus)
        with gpus:
            yield gpus


def _of_tensors(patch: pytest.MonkeyPatch, gpus: FakeGpus) -> None:
    """Where a tensor is, what moves it, and what reads it on the CPU."""
    plain_to, tolist, numpy = Tensor.to, Tensor.tolist, Tensor.numpy
    device = gpus.device_of

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (device(args[0]), args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        asked, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        target, dtype = device(tensor) if asked is None else gpus.named(asked), dtype or tensor.dtype
        if target == device(tensor) or target.type == "meta" or tensor.is_meta:
            where = {"device": target} if target.type == "meta" else {}
            return plain_to(tensor, dtype=dtype, copy=copy, **where, **_given(memory_format=layout))
        return gpus.moved(tensor, target, dtype, waits=not non_blocking)

    def made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made_there(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            tensor = make(data, *args, **kwargs)
            if device is None or gpus.named(device) == gpus.device_of(tensor):
                return tensor
            return to(tensor.detach(), gpus.named(device)).requires_grad_(tensor.requires_grad)

        return made_there

    def on_cpu(read: Callable[..., Any]) -> Callable[..., Any]:
        def waited(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if device(tensor).type == "cuda":
                gpus.wait(read.__name__)
            return read(tensor, *args, **kwargs)

        return waited

    def refused(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if device(tensor).type == "cuda":
            raise TypeError(f"can't convert {device(tensor)} device type tensor to numpy")
        return numpy(tensor, *args, **kwargs)

    replaced: dict[str, Any] = {
        "device": property(device),
        "is_cuda": property(lambda tensor: device(tensor).type == "cuda"),
        "is_cpu": property(lambda tensor: device(tensor).type == "cpu"),
        "get_device": lambda tensor: -1 if device(tensor).index is None else device(tensor).index,
        "to": to,
        "cpu": lambda tensor, **_: to(tensor, CPU),
        "cuda": lambda tensor, device=None, non_blocking=False, **_: to(
            tensor, gpus.named("cuda" if device is None else device), non_blocking=non_blocking
        ),
        "tolist": on_cpu(tolist),
        "numpy": refused,
        "new_tensor": lambda tensor, data, **kwargs: made(torch.tensor)(
            data, **{"dtype": tensor.dtype, "device": device(tensor), **kwargs}
        ),
        "record_stream": lambda tensor, stream: None,
        "pin_memory": lambda tensor, device=None: tensor,
    }
    for name, value in replaced.items():
        patch.setattr(Tensor, name, value)
    for name in ("tensor", "as_tensor", "asarray"):
        patch.setattr(torch, name, made(getattr(torch, name)))

    def one_hot(tensor: Tensor, num_classes: int) -> Tensor:  # makes zeros where torch itself is, on the CPU
        zeros = torch.zeros(*tensor.shape, num_classes, dtype=torch.int64, device=device(tensor))
        return zeros.scatter_(-1, tensor.unsqueeze(-1), 1)

    patch.setattr(torch.nn.functional, "one_hot", one_hot)


def _of_cuda(patch: pytest.MonkeyPatch, gpus: FakeGpus) -> None:
    """Devices, their memory, streams and events. Work is done when it is asked for, so nothing is ever waited for; that
    a GPU would be is noted."""

    class Stream:
        def __init__(self, device: Any = None, **_: Any) -> None:
            self.device = gpus.named("cuda" if device is None else device)

        def wait_stream(self, other: Stream) -> None:
            """Work on the device waits, not the host."""

        def synchronize(self) -> None:
            gpus.wait("synchronize")

    class Event:
        def __init__(self, **_: Any) -> None:
            self.seconds = 0.0

        def record(self, stream: Any = None) -> None:
            self.seconds = time.perf_counter()

        def elapsed_time(self, later: Event) -> float:
            return 1000 * (later.seconds - self.seconds)

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            gpus.wait("synchronize")

    def exchange(device: int) -> int:
        before = gpus.current
        gpus.current = device if device >= 0 else before
        return before

    def of(device: Any) -> torch.device:
        return gpus.named("cuda" if device is None else device)

    def reset(device: Any = None) -> None:
        gpus.peak[of(device)] = gpus.live[of(device)]

    streams = {number: Stream(number) for number in range(gpus.n)}
    properties = SimpleNamespace(
        total_memory=gpus.memory, name="fake", is_integrated=0, major=9, minor=0, multi_processor_count=1
    )
    replaced: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "_exchange_device": exchange,
        "_lazy_init": lambda: None,
        "_maybe_exchange_device": exchange,
        "current_device": lambda: gpus.current,
        "current_stream": lambda device=None: streams[of(device).index],
        "default_stream": lambda device=None: streams[of(device).index],
        "device_count": lambda: gpus.n,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "get_per_process_memory_fraction": lambda device=None: 1.0,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_initialized": lambda: True,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda device=None: gpus.peak[of(device)],
        "mem_get_info": lambda device=None: (gpus.memory - gpus.live[of(device)], gpus.memory),
        "memory_allocated": lambda device=None: gpus.live[of(device)],
        "memory_stats": lambda device=None: {},
        "memory_reserved": lambda device=None: gpus.live[of(device)],
        "reset_peak_memory_stats": reset,
        "set_device": lambda device: exchange(of(device).index),
        "set_rng_state": lambda state, device=None: None,
        "set_rng_state_all": lambda states: None,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "synchronize": lambda device=None: gpus.wait("synchronize"),
    }
    for name, value in replaced.items():
        patch.setattr(torch.cuda, name, value)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
