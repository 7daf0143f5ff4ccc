"""Shared by the tests of the collector: tiny models, documents, and their statistics as the product takes them."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_da.adapter import find_adapter
from lora_da.collect.plan import make_plan
from lora_da.collect.schedule import Sweep
from lora_da.collect.survey import survey
from lora_da.config import LoraDAConfig
from lora_da.model.state import estimation_mode
from lora_da.samples.draw import draw
from lora_da.statistics import LayerStatistics
from lora_da.tasks import find_task

VOCABULARY = 97
PREFIX = "base_model.model."


def llama(dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config).to(dtype)


def with_lora(base: PreTrainedModel, **changes: object) -> PeftModel:
    """A fresh adapter on a copy: the base stays as the oracle wants it."""
    return get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear", **changes))


def documents(lengths: tuple[int, ...] = (9, 14, 6, 11), seed: int = 0) -> list[dict[str, Tensor]]:
    """Documents with a masked prompt of a third of their tokens."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        ids = torch.randint(1, VOCABULARY, (n,), generator=g)
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(n) < n // 3, -100, ids)})
    return rows


def padded(rows: list[dict[str, Tensor]], left: bool = False) -> dict[str, Tensor]:
    """One batch, a row per document; what is padding holds arbitrary tokens, so that counting it would show."""
    width = max(len(r["input_ids"]) for r in rows)

    def pad(t: Tensor, value: int) -> Tensor:
        fill = torch.full((width - len(t),), value)
        return torch.cat([fill, t] if left else [t, fill])

    return {
        "input_ids": torch.stack([pad(r["input_ids"], 7) for r in rows]),
        "labels": torch.stack([pad(r["labels"], -100) for r in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(r["labels"]), 0) for r in rows]),
    }


def packed(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One row of all documents, told apart by positions that start anew; the label of a first token is never used."""
    labels = [torch.cat([torch.tensor([-100]), r["labels"][1:]]) for r in rows]
    return {
        "input_ids": torch.cat([r["input_ids"] for r in rows])[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(r["labels"])) for r in rows])[None],
    }


def collected(
    model: PeftModel, batches: list[dict[str, Tensor]], averaging: str = "tokens", full: bool = True
) -> dict[str, LayerStatistics]:
    """The product's statistics of every layer, in the plan that it makes, under the base model's names."""
    adapter, task, device = find_adapter(model), find_task(model.get_base_model()), torch.device("cpu")
    full_fisher = frozenset(layer.name for layer in adapter.layers if full)
    preset = LoraDAConfig(averaging=averaging).resolved_preset()
    found = {}
    with estimation_mode(model), tqdm(disable=True) as progress:
        data = draw(batches, 1000, None, 1000, task.read)
        surveyed = survey(task, adapter.layers, task.inputs(data.batches[-1].glimpse(), device))
        plan = make_plan(surveyed, adapter.layers, full_fisher, data.batches, device, None)
        sweep = Sweep(task, data, plan, surveyed, preset, full_fisher, device)
        for layers, collector in sweep.collected(progress):
            units = data.n_loss_tokens if averaging == "tokens" else data.n_samples
            found |= {layer.name.removeprefix(PREFIX): collector.statistics(layer.name, units) for layer in layers}
    assert len(found) == len(adapter.layers) and all(s is not None for s in found.values())
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in float64."""
    return (torch.linalg.norm(a.double() - b.double()) / torch.linalg.norm(b.double())).item()


def worst(ours: dict[str, LayerStatistics], other: dict) -> float:
    """The largest relative distance of any G, Z or Y of any layer."""
    assert ours.keys() == other.keys()
    return max(
        distance(getattr(ours[n], f), getattr(other[n], f))
        for n in ours
        for f in ("grad", "input_cov", "output_fisher")
    )
