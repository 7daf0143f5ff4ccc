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
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lora_da import __version__
from lora_da.adapter import Adapter, stored_base
from lora_da.cache.digests import Digests
from lora_da.config import LoraDAConfig
from lora_da.samples.batch import Batch
from lora_da.samples.draw import InitData
from lora_da.tasks import RewardLoss

NOT_IN_THE_KEY = ("memory_budget", "cache_dir", "preset", "match_rate")  # its numbers are; done with what was solved
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
    digests = Digests()
    base = model.get_base_model()
    device = base.get_input_embeddings().weight.device.type
    ingredients = {
        "base": digests.of("the model", stored_base(model)),
        "model": digests.of("the model's config", _model(base)),
        "reward": None if reward is None else dataclasses.asdict(reward),
        "adapter": _adapter(adapter),
        "data": _data(data, digests),
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


def _data(data: InitData, digests: Digests) -> dict[str, Any]:
    batches = {"batches": data.batches, "others": data.others}
    apart = {*batches, "looked_at"}
    counted = {f.name: getattr(data, f.name) for f in dataclasses.fields(data) if f.name not in apart}
    rows = [(row.row, row.digest.hex()) for row in data.looked_at]  # the report names them by their indices
    return {"counted": counted, "looked_at": rows} | {
        name: [_batch(b, digests) for b in group] for name, group in batches.items()
    }


def _batch(batch: Batch, digests: Digests) -> dict[str, Any]:
    return {
        "inputs": digests.of("a batch", batch.inputs),
        "targets": digests.digest(batch.tokens.targets),
        "document": digests.digest(batch.tokens.document),
    }
