"""Contents of tensors told apart where they lie, so that nothing but sums leaves a device.

A content is told by wrapping sums of its 32-bit words, each times an odd number of its place in a row. One changed
word, or two that change places, always change the sum of their row; of any other change one in 2³² goes unseen, at
most. Rows are told apart by the order of their sums.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_da.errors import LoraDAError
from lora_da.model.sharding import held, shape

ROW = 1 << 14  # words that have multipliers of their own
CHUNK = 1 << 20  # words whose products exist at once, in 8 MiB: a multiple of ROW


class Digests:
    """Digests of tensors, each taken once, whoever asks: tied weights, and inputs that several batches share."""

    def __init__(self) -> None:
        chance = random.Random(0)
        # Their lower halves are distinct, so that their differences are no multiples of 2³².
        lower = chance.sample(range(1, 1 << 32, 2), ROW)
        self._multipliers = {
            torch.device("cpu"): torch.tensor([chance.getrandbits(31) << 32 | low for low in lower], device="cpu")
        }
        self._digests: dict[int, tuple[Tensor, str]] = {}

    def of(self, what: str, value: Any) -> Any:
        """The same nest of plain values with a digest for each tensor; `what` it is of, for the message.

        Raises:
            LoraDAError: a tensor is not in memory, or a value is of a kind that cannot be compared.
        """
        if isinstance(value, Tensor):
            if value.is_meta:
                raise LoraDAError(
                    f"{what} is not in memory (offloaded to the CPU or a disk?) and cannot be compared with that of an "
                    "earlier run; leave `cache_dir` unset"
                )
            return self.digest(value)
        if isinstance(value, Mapping):
            return {str(key): self.of(f"{key} in {what}", entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(what, entry) for entry in value]
        if isinstance(value, (set, frozenset)):
            return sorted(map(str, value))
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.dtype):
            return str(value)
        if hasattr(value, "tolist"):  # of numpy
            return value.tolist()
        raise LoraDAError(
            f"{what} is a {type(value).__name__}, which cannot be compared with that of an earlier run; leave "
            "`cache_dir` unset"
        )

    def digest(self, tensor: Tensor) -> str:
        """Digest dtype, shape and content, wherever they lie; a tensor made of others is told by those."""
        if id(tensor) in self._digests:  # tied weights
            return self._digests[id(tensor)][1]
        content = hashlib.sha256(f"{tensor.dtype} {shape(tensor)}".encode())
        whole, tensor = tensor, held(tensor)
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            content.update(f"{type(tensor).__qualname__} {context}".encode())
            for name in names:
                content.update(self.digest(getattr(tensor, name)).encode())
        else:
            for part in self._sums(tensor.detach()):
                content.update(part.cpu().numpy().tobytes())
        self._digests[id(whole)] = whole, content.hexdigest()  # held, so that no other tensor takes its place
        return content.hexdigest()

    def _sums(self, tensor: Tensor) -> list[Tensor]:
        """A sum for each row, on the tensor's device; bytes that fill no word as they are."""
        content = tensor.contiguous().view(-1).view(torch.uint8)
        if content.storage_offset() % 4:
            content = content.clone()
        n_words = content.numel() // 4
        words, rest = content[: 4 * n_words].view(torch.int32), content[4 * n_words :]
        if tensor.device not in self._multipliers:
            self._multipliers[tensor.device] = self._multipliers[torch.device("cpu")].to(tensor.device)
        multipliers = self._multipliers[tensor.device]
        sums = []
        for chunk in words.split(CHUNK) if n_words else ():
            whole = len(chunk) // ROW * ROW
            sums.append((chunk[:whole].view(-1, ROW) * multipliers).sum(1))
            sums.append((chunk[whole:] * multipliers[: len(chunk) - whole]).sum(0, keepdim=True))
        return [torch.cat(sums), rest] if sums else [rest]
