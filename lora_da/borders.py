"""Hidden states and their gradients at the borders between segments, kept on the CPU, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Border:
    """One tensor a batch. On a GPU, copies run beside the computation, through pinned memory.

    Args:
        n: batches.
        device: where the tensors come from and go to.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self._held: list[Tensor | None] = [None] * n
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, Tensor] | None = None

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep a batch's tensor."""
        tensor = tensor.detach()
        if self._copies is None:
            self._held[number] = tensor
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            self._held[number] = tensor.to("cpu", non_blocking=True)  # into pinned memory, as torch does it for these
        tensor.record_stream(self._copies)

    def get(self, number: int, following: int | None = None) -> Tensor:
        """A batch's tensor on the device; the copy of the `following` one is begun."""
        tensor = self._ahead[1] if self._ahead is not None and self._ahead[0] == number else self._fetch(number)
        self._ahead = None
        if self._copies is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._copies)
            tensor.record_stream(current)
            if following is not None and following < len(self._held):
                self._ahead = (following, self._fetch(following))
        return tensor

    def divide(self, shapes: Sequence[Sequence[tuple[int, int]] | None]) -> None:
        """Divide what is kept for each batch by rows into parts of the given (rows, columns); None: as it is."""
        self._wait()
        held: list[Tensor | None] = []
        for tensor, parts in zip(self._held, shapes, strict=True):
            if tensor is None or parts is None:
                held += [tensor] * len(parts or [None])
                continue
            first = 0
            for rows, columns in parts:
                held.append(tensor[first : first + rows, :columns])
                first += rows
        self._held = held

    def scale(self, factor: float) -> None:
        """Multiply everything that is kept."""
        self._wait()
        self._held = [None if held is None else held * factor for held in self._held]

    def _wait(self) -> None:
        if self._copies is not None:
            self._copies.synchronize()
        self._ahead = None

    def _fetch(self, number: int) -> Tensor:
        held = self._held[number]
        if held is None:
            raise LookupError(f"nothing is kept for batch {number}")
        if self._copies is None:
            return held
        with torch.cuda.stream(self._copies):
            return held.to(self._device, non_blocking=True)
