"""Shared by the tests of the collector: tiny models, documents, and their statistics as the product takes them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_da.adapter import find_adapter
from lora_da.collect import Planner, collect, make_plan
from lora_da.collect.collector import Collector
from lora_da.collect.selection import Selection
from lora_da.collect.sums import SegmentSums
from lora_da.model.state import estimation_mode
from lora_da.model.streams import Streams
from lora_da.needs import Needs, Sums
from lora_da.processes import Processes, Run
from lora_da.samples.draw import draw
from lora_da.statistics import LayerStatistics
from lora_da.tasks import RewardLoss, find_task
from lora_da.tasks.head import LossPass

VOCABULARY = 97
PREFIX = "base_model.model."
PLENTY = 64.0  # GiB of a budget in which every tiny model is one pass


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


# Each batch's loss as it is, and nobody listens.
PLAIN_PASS = LossPass(1.0, None, contextlib.nullcontext, lambda n, weights: None)


def needs(averaging: str = "tokens", full: bool = True) -> Needs:
    """All sums, the output Fisher in full or as its diagonal."""
    return Needs(Sums(), lambda i, o: 0, full_fisher_up_to=math.inf if full else 0, averaging=averaging)


def watching(layers: Mapping[str, nn.Module], full: bool = False) -> Collector:
    """A collector of layers that all read the same tokens."""
    sums = SegmentSums(layers, needs(full=full))
    return Collector(layers, sums, Selection(layers, Streams(), {}, None), contextlib.nullcontext)


def collected(
    model: PeftModel,
    batches: list[dict[str, Tensor]],
    averaging: str = "tokens",
    full: bool = True,
    plan: Planner = make_plan,
    reward: RewardLoss | None = None,
) -> dict[str, LayerStatistics]:
    """The product's statistics of every layer, in the plan that it makes, under the base model's names."""
    layers, task = find_adapter(model).layers, find_task(model.get_base_model(), reward)
    run = Run(Processes(), torch.device("cpu"), PLENTY, False)
    with estimation_mode(model):
        data = draw(batches, 1000, None, 1000, task.read, True)
        found = collect(task, layers, data, needs(averaging, full), run, lambda layer, seen: seen.statistics, plan)
    assert len(found.outcomes) == len(layers)
    assert all(isinstance(outcome, LayerStatistics) for outcome in found.outcomes.values())
    return {name.removeprefix(PREFIX): statistics for name, statistics in found.outcomes.items()}


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
