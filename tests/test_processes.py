"""What processes send each other goes through a GPU's memory a slice at a time, where there is no other way."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import distributed as dist

import lora_da.processes
from lora_da.errors import LoraDAError
from lora_da.processes import Processes

pytestmark = pytest.mark.once

SIZE = 3


class Exchange:
    """Broadcasts between threads that stand for processes.

    Attributes:
        largest: bytes of the largest tensor that was sent.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.largest = 0
        self._barrier, self._own = threading.Barrier(SIZE), threading.local()
        self._sent: torch.Tensor | None = None
        monkeypatch.setattr(dist, "broadcast", self._broadcast)

    def everywhere(self, do: Any) -> list[Any]:
        """What `do` returns or raises, given each of the processes."""
        found: list[Any] = [None] * SIZE

        def run(rank: int) -> None:
            processes = Processes()
            processes.rank, processes.size = self._own.rank, _ = rank, SIZE
            try:
                found[rank] = do(processes)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(SIZE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return found

    def _broadcast(self, tensor: torch.Tensor, source: int) -> None:
        if self._own.rank == source:
            self._sent, self.largest = tensor, max(self.largest, tensor.nbytes)
        self._barrier.wait(30)
        if self._own.rank != source:
            assert self._sent is not None
            tensor.copy_(self._sent)
        self._barrier.wait(30)


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch) -> Exchange:
    monkeypatch.setattr(lora_da.processes, "SLICE", 1000)
    return Exchange(monkeypatch)


def factors(rank: int) -> dict[str, torch.Tensor]:
    return {f"layer {k}": torch.full((100 * (rank + 1), 4), float(rank)) for k in range(5)}


def test_each_gets_what_all_have(exchange: Exchange) -> None:
    found = exchange.everywhere(lambda processes: processes.gathered(factors(processes.rank)))
    for ranks in found:
        assert [{name: (len(t), t.unique().item()) for name, t in of_rank.items()} for of_rank in ranks] == [
            {f"layer {k}": (100 * (rank + 1), float(rank)) for k in range(5)} for rank in range(SIZE)
        ]
    assert exchange.largest == 1000


def test_each_gets_what_the_first_has_made(exchange: Exchange) -> None:
    found = exchange.everywhere(lambda processes: processes.once(factors, processes.rank))
    assert all(torch.equal(made["layer 4"], torch.zeros(100, 4)) for made in found)
    assert exchange.largest == 1000


def test_what_the_first_raises_all_raise(exchange: Exchange) -> None:
    def fail() -> None:
        raise ValueError("no such file")

    first, *others = exchange.everywhere(lambda processes: processes.once(fail))
    assert isinstance(first, ValueError)
    assert [(type(error), str(error)) for error in others] == [(LoraDAError, "no such file")] * (SIZE - 1)
