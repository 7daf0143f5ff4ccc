"""GPUs that are not there: memory on the CPU that counts as theirs, so that code for CUDA runs and is watched.

Where a tensor is goes by its storage: what an operation makes is where its inputs are, views stay with their memory,
and only a copy moves. torch itself works on the CPU throughout, so numbers are the CPU's bit for bit. What a GPU would
not forgive is found here: operations on tensors of several devices are refused with the line that asked for them, and
every place where the host would wait for the device is written down.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
NOT_CALLERS = (str(Path(torch.__file__).parent), __file__, str(Path(__file__).with_name("fake_cuda.py")))
CPU = torch.device("cpu")

aten = torch.ops.aten
# How large a result is, or a number of it, is asked of the device: the host waits.
WAITS = {
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive),
    *(aten._linalg_eigh, aten._linalg_svd, aten.cholesky_inverse, aten.linalg_cholesky),  # whether it went well
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
WIDENING = {aten.mm.dtype: aten.mm.default, aten.addmm.dtype_out: aten.addmm.out}  # which the CPU does not have
COPIES = {aten.copy_, aten._to_copy}


class MixedDevices(RuntimeError):
    """An operation on tensors of several devices."""


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for a GPU: what is done there, on which line, and whether that is this project's and
    no library's."""

    what: str
    line: str
    ours: bool


class FakeGpus(TorchDispatchMode):
    """`n` GPUs of `memory` bytes each; see `fake_cuda.fake_gpus`, which opens them.

    Attributes:
        current: the number of the device that `cuda` alone means.
        waits: how often the host has waited, by place.
        widens: whether products of 16 bit can have a result of 32.
        adds_widened: whether these can be added to a matrix of 32 bit in its memory.
        wide_products: how many were asked to.
        live, peak: bytes of each device in use, and the most there were.
    """

    def __init__(self, n: int, memory: int) -> None:
        super().__init__()
        self.n, self.memory, self.current = n, memory, 0
        self.widens, self.adds_widened, self.wide_products = True, True, 0
        self.waits: Counter[Wait] = Counter()
        self.live, self.peak = Counter[torch.device](), Counter[torch.device]()
        self._places: dict[
            int, tuple[torch.device, Any]
        ] = {}  # of storages, by id, with a reference that sees their end
        self._in_kernel = False  # where everything is on the CPU

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is."""
        if tensor.is_meta:
            return torch.device("meta")
        if self._in_kernel or tensor.layout != torch.strided:
            return CPU
        place = self._places.get(id(tensor.untyped_storage()))
        return CPU if place is None else place[0]

    def named(self, device: Any) -> torch.device:
        """A device as it is asked for, with its number."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return device
        device = torch.device("cuda", self.current if device.index is None else device.index)
        if device.index >= self.n:
            raise RuntimeError(f"invalid device ordinal: {device}")
        return device

    def moved(self, tensor: Tensor, device: torch.device, dtype: torch.dtype, waits: bool) -> Tensor:
        """A copy on another device, through which gradients go back to where the tensor is."""
        moved: Tensor = _Moved.apply(tensor, self, device, dtype, waits)
        return moved

    def copied(self, tensor: Tensor, device: torch.device, dtype: torch.dtype, waits: bool) -> Tensor:
        """The same without a graph."""
        if waits and CPU in (device, self.device_of(tensor)):
            self.wait(f"copy to {device.type}")
        with self._kernel(), torch.no_grad():
            copy = tensor.detach().to(dtype, copy=True)
        self._put(copy, device)
        return copy

    def wait(self, what: str) -> None:
        """Note that the host waits here."""
        path, line = _caller()
        self.waits[Wait(what, f"{path}:{line}", not Path(path).is_absolute())] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._in_kernel:
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = self._device(func, given, args)
        asked = CPU if kwargs.get("device") is None else self.named(kwargs["device"])
        if asked.type == "cuda":
            device, kwargs["device"] = asked, CPU
        elif asked.type == "meta":
            device = asked
        self._note_waits(func, given, args, kwargs)
        if func in WIDENING:
            self.wide_products += 1
            if not (self.widens and (self.adds_widened or func is aten.mm.dtype)):
                raise RuntimeError("out_dtype is not supported by these GPUs")
        with self._kernel():
            if func in WIDENING:
                *added, a, b, dtype = args
                func, args = WIDENING[func], (*added, a.to(dtype), b.to(dtype))
            made = func(*args, **kwargs)
        if device.type == "cuda":
            known = {id(tensor.untyped_storage()) for tensor in given if tensor.layout == torch.strided}
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in known:
                    self._put(tensor, device)
        return made

    def _device(self, func: Any, given: list[Tensor], args: tuple[Any, ...]) -> torch.device:
        """Where an operation runs.

        Raises:
            MixedDevices: its tensors are on several devices; single numbers on the CPU go with any.
        """
        if func.overloadpacket in COPIES:
            return self.device_of(given[0])
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func.overloadpacket in INDEXING and first is not None:  # what is on the CPU is sent after
            given = [t for t in given if t is first or self.device_of(t) != CPU]
        devices = {self.device_of(t) for t in given if t.dim() or self.device_of(t) != CPU} or {CPU}
        writes = first is not None and func._schema.is_mutable and self.device_of(first) not in devices
        if len(devices) > 1 or writes:
            where = ", ".join(f"{tuple(t.shape)} on {self.device_of(t)}" for t in given)
            path, line = _caller()
            raise MixedDevices(f"{func} at {path}:{line} of tensors {where}")
        return next(iter(devices))

    def _note_waits(self, func: Any, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        devices = {self.device_of(tensor) for tensor in given}
        packet = func.overloadpacket
        if all(device.type != "cuda" for device in devices):
            return
        if packet in WAITS:
            self.wait(packet._qualified_op_name.removeprefix("aten::"))
        elif packet in INDEXING and any(t.dtype == torch.bool for t in args[1] if t is not None):
            self.wait("mask")  # how many are true
        elif packet in INDEXING and CPU in devices:
            self.wait("copy of indices")
        elif packet is aten.copy_ and CPU in devices and not (args[2:] or [kwargs.get("non_blocking")])[0]:
            self.wait("copy")

    def _put(self, tensor: Tensor, device: torch.device) -> None:
        """Count a tensor's memory as a device's."""
        storage = tensor.untyped_storage()
        key, nbytes = id(storage), storage.nbytes()
        if device.type != "cuda" or key in self._places:
            return

        def freed(_: Any) -> None:
            del self._places[key]
            self.live[device] -= nbytes

        if self.live[device] + nbytes > self.memory:
            raise torch.OutOfMemoryError(f"{device} is out of memory: {nbytes:,} bytes beside {self.live[device]:,}")
        self._places[key] = device, weakref.ref(storage, freed)
        self.live[device] += nbytes
        self.peak[device] = max(self.peak[device], self.live[device])

    @contextmanager
    def _kernel(self) -> Iterator[None]:
        self._in_kernel = True
        try:
            yield
        finally:
            self._in_kernel = False


class _Moved(torch.autograd.Function):
    """A copy to another device; its backward copies back."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, gpus: FakeGpus, device: torch.device, dtype: torch.dtype, waits: bool
    ) -> Tensor:
        ctx.gpus, ctx.back = gpus, (gpus.device_of(tensor), tensor.dtype, waits)
        return gpus.copied(tensor, device, dtype, waits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gpus.copied(gradient, *ctx.back), None, None, None, None


def _caller() -> tuple[str, int]:
    """Path and line of the innermost frame that is neither torch's nor the fake's; the path is relative in this
    project."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(NOT_CALLERS):
        frame = frame.f_back
    assert frame is not None, "somebody calls"
    path = frame.f_code.co_filename
    ours = path.startswith(f"{ROOT}/") and "site-packages" not in path
    return path.removeprefix(f"{ROOT}/") if ours else path, frame.f_lineno
