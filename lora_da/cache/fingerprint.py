"""What a solution depends on, as one key: where the key is the same, so is the solution, up to rounding.

In the key: everything that is stored of the base (each parameter and buffer, quantised bytes and their scales), its
class, config, attention and loss; names, shapes, ranks, scaling and dtypes of the adapter's layers; every tensor of the
drawn batches, which of their tokens count, and the population; the method and its settings; the autocast dtype; the
versions of lora-da, torch, peft and transformers.

Not in the key, because they change a solution by rounding only: the memory budget and the plan, the device and its
number formats (TF32), checkpointing, fused kernels. Nor what neither a tensor nor the config says of a model: a forward
that was replaced, a hook.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lora_da import __version__
from lora_da.adapter import Adapter, stored_base
from lora_da.config import LoraDAConfig
from lora_da.errors import LoraDAError
from lora_da.model.sharding import held, shape
from lora_da.samples.batch import Batch
from lora_da.samples.draw import InitData
from lora_da.tasks import RewardLoss

ROW = 1 << 14  # words that have multipliers of their own
CHUNK = 1 << 20  # words whose products exist at once, in 8 MiB: a multiple of ROW
NOT_IN_THE_KEY = ("memory_budget", "cache_dir", "preset")  # its numbers are
NOT_OF_THE_CONFIG = ("_name_or_path", "transformers_version")  # where the model lies; what is in the key already


def fingerprint(
    model: PeftModel, adapter: Adapter, data: InitData, config: LoraDAConfig, reward: RewardLoss | None = None
) -> str:
    """The key, 64 hexadecimal digits; taken in estimation mode, which sets what does not matter in the model's config.

    The base is read on its own device, about 1 GB a second on a CPU core, and nothing but sums leaves it. Of one that
    is sharded over processes each reads its own part, and their keys differ.

    Raises:
        LoraDAError: a weight is not where it can be read, or the config or a batch holds what cannot be compared.
    """
    words = _Words()
    base = model.get_base_model()
    device = base.get_input_embeddings().weight.device.type
    ingredients = {
        "base": words.of("the model", stored_base(model)),
        "model": words.of("the model's config", _model(base)),
        "reward": None if reward is None else dataclasses.asdict(reward),
        "adapter": _adapter(adapter),
        "data": _data(data, words),
        "settings": {name: value for name, value in config.settings().items() if name not in NOT_IN_THE_KEY},
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
        "versions": {"lora-da": __version__} | {name: version(name) for name in ("torch", "peft", "transformers")},
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _model(base: PreTrainedModel) -> dict[str, Any]:
    loss = base.loss_function
    return {
        "class": f"{type(base).__module__}.{type(base).__qualname__}",
        "config": {name: value for name, value in base.config.to_dict().items() if name not in NOT_OF_THE_CONFIG},
        # It tells documents in a packed row apart in its own way.
        "attention": base.config._attn_implementation,
        "loss": f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', type(loss).__qualname__)}",
    }


def _adapter(adapter: Adapter) -> dict[str, Any]:
    layers = {
        layer.name: [
            *(layer.rank, layer.in_features, layer.out_features, layer.scaling, layer.plain_variance),
            *(str(layer.lora_A.dtype), str(layer.lora_B.dtype)),
        ]
        for layer in adapter.layers
    }
    return {"layers": layers, "left": adapter.left}


def _data(data: InitData, words: _Words) -> dict[str, Any]:
    batches = {"batches": data.batches, "others": data.others}
    apart = {*batches, "looked_at"}
    counted = {f.name: getattr(data, f.name) for f in dataclasses.fields(data) if f.name not in apart}
    rows = [(row.row, row.digest.hex()) for row in data.looked_at]  # the report names them by their indices
    return {"counted": counted, "looked_at": rows} | {
        name: [_batch(b, words) for b in group] for name, group in batches.items()
    }


def _batch(batch: Batch, words: _Words) -> dict[str, Any]:
    return {
        "inputs": words.of("a batch", batch.inputs),
        "targets": words.digest(batch.tokens.targets),
        "document": words.digest(batch.tokens.document),
    }


class _Words:
    """Tells contents apart by wrapping sums of 32-bit words, each times an odd number of its place in a row.

    One changed word, or two that change places, always change the sum of their row; of any other change one in 2³² goes
    unseen, at most. Rows are told apart by the order of their sums.
    """

    def __init__(self) -> None:
        chance = random.Random(0)
        # Their lower halves are distinct, so that their differences are no multiples of 2³².
        lower = chance.sample(range(1, 1 << 32, 2), ROW)
        self._multipliers = {
            torch.device("cpu"): torch.tensor([chance.getrandbits(31) << 32 | low for low in lower], device="cpu")
        }
        self._digests: dict[int, tuple[Tensor, str]] = {}

    def of(self, what: str, value: Any) -> Any:
        """The same nest of plain values with a digest for each tensor; `what` it is of, for the message."""
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
