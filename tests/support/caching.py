"""Starts with a cache, and what is seen of them."""

from __future__ import annotations

import dataclasses

import torch
from models import adapter_weights, documents, pad, tiny_llama, with_lora
from torch.utils.data import DataLoader

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.cache.store import CacheEntry

ROWS = documents(12)
OF_THIS_CALL = ("seconds", "peak_memory_gib", "memory_of", "settings", "from_cache")


def start(model, folder, data=None, show_progress=False, **settings):
    """Initialise with a cache in `folder`: the report, and how many forwards of the base it took."""
    calls = []
    counting = model.get_base_model().lm_head.register_forward_hook(lambda *_: calls.append(1))
    if not {"gamma", "method"} & settings.keys():
        settings = {"first_step": "gamma", **settings}
    config = LoraDAConfig(samples=8, cache_dir=str(folder) if folder else None, **settings)
    data = data or DataLoader(ROWS, 4, collate_fn=pad)
    try:
        return initialize_lora_da_weights(model, data, config, show_progress=show_progress), len(calls)
    finally:
        counting.remove()


def identical(one, other):
    """In every bit, and in their dtypes."""
    assert one and set(one) == set(other)
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def lasting(report):
    """What a report says in every run from the same solution."""
    return {name: value for name, value in dataclasses.asdict(report).items() if name not in OF_THIS_CALL}


def adapted_llama(seed=0, **config):
    return with_lora(tiny_llama(), seed, **config)


def load(path):
    """What is found in the file of `adapted_llama()`."""
    return CacheEntry(path.parent, path.stem).load(find_adapter(adapted_llama()).layers)


def filled_by(model, folder):
    """The only file in the folder then, and the adapter that it stands for."""
    start(model, folder)
    (path,) = folder.iterdir()
    return path, adapter_weights(model)
