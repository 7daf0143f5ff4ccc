"""The processes that train together: each takes a share of the samples and of the layers, and what one meets, all meet.

Everything here is torch.distributed on its default group. One process alone takes none of these ways.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lora_da.errors import LoraDAError
from lora_da.memory import free_bytes, is_host, is_out_of_memory
from lora_da.model.blocks import NotSequential
from lora_da.model.sharding import is_sharded

logger = logging.getLogger(__name__)

BACKENDS = {"nccl": "cuda", "xccl": "xpu"}  # those that know no other memory than a GPU's
SLICE = 2**24  # bytes of a pickled value that are sent at once

P = ParamSpec("P")
T = TypeVar("T")


class Processes:
    """The processes of this run.

    Args:
        sharded: whether a forward pass is a collective itself (FSDP2, ZeRO-3). All processes then run all samples,
            so that they gather the same parameters in the same order, and only the layers to solve are divided. A
            process that fails in a forward leaves the others waiting inside it, where no message reaches them: its
            error ends it, and the launcher ends the rest.

    Attributes:
        rank, size: this process, and how many there are.
    """

    def __init__(self, sharded: bool = False) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1
        self.sharded = sharded and self.size > 1
        backend = dist.get_backend() if several else ""
        kind = next((kind for name, kind in BACKENDS.items() if name in backend), None)
        self._device = torch.device("cpu")
        if kind is not None:
            self._device = torch.device(kind, torch.get_device_module(kind).current_device())

    def over(self, model: nn.Module) -> Processes:
        """The same processes, with a model that may be sharded over them."""
        return Processes(is_sharded(model))

    @property
    def shares(self) -> int:
        """How many shares the samples are divided into: one where every process runs all."""
        return 1 if self.sharded else self.size

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave the block, or all raise what one of them raised in it. An interrupt is not waited with.

        Raises:
            torch.OutOfMemoryError, NotSequential: another process did.
            LoraDAError: another process failed; with its message.
        """
        if self.size == 1 or self.sharded:
            yield
            return
        try:
            yield
        except Exception as error:
            self._largest(1)
            self.gathered(_describe(error))
            raise
        if self._largest(0):
            self._raise_from_others()

    def everywhere(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `do` returns in this process, where it has succeeded in all of them; see `together`."""
        with self.together():
            return do(*args, **kwargs)

    def once(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `do` returns in the first process, in all of them.

        Raises:
            LoraDAError: in all others, what was raised in the first; with its message.
        """
        if self.size == 1:
            return do(*args, **kwargs)
        made: Any = None
        if self.rank == 0:
            try:
                made = do(*args, **kwargs), None
            except Exception as error:
                self._sent((None, str(error)), 0)
                raise
        made, failed = self._sent(made, 0)
        if failed is not None:
            raise LoraDAError(failed)
        value: T = made
        return value

    def anywhere(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return bool(self._largest(int(flag)))

    def warn(self, *messages: str) -> None:
        """Log warnings, in the first process; empty ones are none."""
        for message in messages if self.rank == 0 else ():
            if message:
                logger.warning("%s", message)

    def gathered(self, value: T) -> list[T]:
        """Each process's value, by rank."""
        return [value] if self.size == 1 else [self._sent(value, rank) for rank in range(self.size)]

    def common(self, key: str) -> str:
        """One key for all: their own where they have the same, another for each list of them."""
        keys = self.gathered(key)
        return key if len(set(keys)) == 1 else hashlib.sha256("".join(keys).encode()).hexdigest()

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return self._largest(number)

    def total(self, value: Tensor) -> Tensor:
        """A scalar of this process's samples, summed over the processes."""
        if self.size > 1 and not self.sharded:
            dist.all_reduce(value)
        return value

    def sum_to(self, owner: int, value: Tensor) -> None:
        """Sum a tensor of this process's samples over the processes, in place in `owner`; elsewhere its values are
        lost."""
        if self.size > 1 and not self.sharded:
            dist.reduce(value, dst=owner)

    def free_bytes(self, device: torch.device) -> int:
        """What every process may allocate on its device: the least of them, and its part of memory they share."""
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if is_host(device) else 1
        return -self._largest(-(free_bytes(device) // sharing))

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Which process takes which piece of work: the most costly first, each to the one with the least so far."""
        load = [0.0] * self.size
        owners = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owners[name] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[owners[name]] += costs[name]
        return owners

    def _sent(self, value: Any, source: int) -> Any:
        """The value that process `source` has, in all of them. It is pickled, which only our own processes' may be.

        Where no other way leads through than a GPU's memory, it takes `SLICE` bytes of that, whatever is sent: the
        factors of all layers are as much as an adapter, and nobody has counted them there.
        """
        is_mine = self.rank == source
        data = pickle.dumps(value) if is_mine else b""
        size = torch.tensor(len(data), dtype=torch.int64, device=self._device)
        dist.broadcast(size, source)
        received = bytearray()
        for start in range(0, int(size), SLICE):
            part = torch.empty(min(SLICE, int(size) - start), dtype=torch.uint8, device=self._device)
            if is_mine:
                part = torch.frombuffer(bytearray(data[start : start + SLICE]), dtype=torch.uint8).to(self._device)
            dist.broadcast(part, source)
            received += part.cpu().numpy().tobytes()
        return value if is_mine else pickle.loads(bytes(received))

    def _largest(self, number: int) -> int:
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.int64, device=self._device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def _raise_from_others(self) -> None:
        found: list[Any] = self.gathered(None)
        rank, (kind, message) = next((rank, outcome) for rank, outcome in enumerate(found) if outcome is not None)
        if kind == "memory":
            raise torch.OutOfMemoryError(f"rank {rank}: {message}")
        if kind == "blocks":
            raise NotSequential(message)
        raise LoraDAError(f"rank {rank} of {self.size} failed: {message}")


def _describe(error: Exception) -> Any:
    kind = "memory" if is_out_of_memory(error) else "blocks" if isinstance(error, NotSequential) else "error"
    named = isinstance(error, (LoraDAError, NotSequential))
    return kind, str(error) if named else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Run:
    """Where an initialisation runs, and what it may use.

    Args:
        processes: that run it together.
        device: where the samples go.
        memory_budget: GiB that may be used there beside the model; a share of what is free if None.
        show_progress: whether this process shows a progress bar.
        offloading: makes a context in which what a model keeps for its backward is moved away.
    """

    processes: Processes
    device: torch.device
    memory_budget: float | None
    show_progress: bool
    offloading: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
