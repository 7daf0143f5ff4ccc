"""Hidden states and their gradients at the borders between segments, kept on the CPU, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from lora_da.memory import counts_memory, is_out_of_memory


class Border:
    """One tensor a batch. On a GPU, copies run beside the computation, through pinned memory.

    Args:
        n: batches.
        device: where the tensors come from and go to.
        copies: the stream to copy in, one for all borders: each stream has memory of its own; None on a CPU.

    Attributes:
        nbytes: of what is kept.
    """

    def __init__(self, n: int, device: torch.device, copies: torch.Stream | None) -> None:
        self.nbytes = 0
        self._held: list[Tensor | None] = [None] * n
        self._factor = 1.0
        self._device, self._copies = device, copies
        self._ahead: tuple[int, Tensor] | None = None

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep a batch's tensor."""
        tensor = tensor.detach()
        self.nbytes += tensor.nbytes
        if self._copies is None:
            self._held[number] = tensor
            return
        gpu = torch.get_device_module(self._device)
        self._copies.wait_stream(gpu.current_stream(self._device))
        with gpu.stream(self._copies):
            try:
                self._held[number] = tensor.to("cpu", non_blocking=True)  # into pinned memory, as torch does it here
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._held[number] = tensor.to("cpu")  # there may be a limit on pinned memory alone
        tensor.record_stream(self._copies)

    def get(self, number: int, following: int | None = None) -> Tensor:
        """A batch's tensor on the device; the copy of the `following` one is begun."""
        tensor = self._ahead[1] if self._ahead is not None and self._ahead[0] == number else self._fetch(number)
        self._ahead = None
        if self._copies is not None:
            current = torch.get_device_module(self._device).current_stream(self._device)
            current.wait_stream(self._copies)
            tensor.record_stream(current)
            if following is not None and following < len(self._held):
                self._ahead = (following, self._fetch(following))
        return tensor if self._factor == 1.0 else tensor * self._factor

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
                held.append(tensor[first : first + rows, :columns].contiguous())
                first += rows
        self._held = held
        self.nbytes = sum(tensor.nbytes for tensor in held if tensor is not None)

    def scale(self, factor: float) -> None:
        """Multiply everything that is kept."""
        self._factor *= factor

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
        with torch.get_device_module(self._device).stream(self._copies):
            return held.to(self._device, non_blocking=True)


class Borders:
    """What is kept between the segments of a decoder, by the number of the block above the border.

    Attributes:
        hidden: the hidden states that enter the block.
        gradients: of the loss, in the same.
        first_batch: the first batch's hidden state where a segment begins, to check the segment below by.
        most_bytes: that were kept at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.get_device_module(device).Stream(device) if counts_memory(device) else None
        self.hidden: dict[int, Border] = {}
        self.gradients: dict[int, Border] = {}
        self.first_batch: dict[int, Tensor] = {}
        self.most_bytes = 0
        self._all: WeakSet[Border] = WeakSet()

    def new(self, n: int) -> Border:
        """A border for `n` batches."""
        border = Border(n, self._device, self._copies)
        self._all.add(border)
        return border

    def note_bytes(self) -> None:
        """Look at what is kept now, for `most_bytes`."""
        self.most_bytes = max(self.most_bytes, sum(border.nbytes for border in self._all))

    def nearest(self, first: int) -> int:
        """The highest border at or below block `first` whose hidden states are kept; 0, the decoder's own, if none."""
        return max((border for border in self.hidden if border <= first), default=0)

    def forget(self, first: int, stop: int) -> None:
        """The segment from block `first` to before `stop` is done, and nobody needs what is above it any more."""
        self.gradients.pop(stop, None)
        self.first_batch.pop(stop, None)
        for border in [border for border in self.hidden if border >= first]:
            del self.hidden[border]
        if self._copies is not None and not self.hidden:
            # torch keeps pinned memory for itself, locked, and training has no use for so much of it
            getattr(torch._C, "_host_emptyCache", lambda: None)()

    def divide(self, shapes: Sequence[Sequence[tuple[int, int]] | None]) -> None:
        """Batches are divided by rows, as in `Border.divide`."""
        for border in (*self.hidden.values(), *self.gradients.values()):
            border.divide(shapes)
        if shapes[0] is not None:
            rows, columns = shapes[0][0]
            self.first_batch = {k: hidden[:rows, :columns] for k, hidden in self.first_batch.items()}
