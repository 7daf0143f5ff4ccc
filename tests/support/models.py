"""Tiny random models, documents and batches: nothing is downloaded, everything is seeded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 128
IGNORED = -100
LENGTHS = (9, 14, 6, 11)  # of a few documents
PADDING = 7  # what padding holds, a token like others, so that counting it would show
PREFIX = "base_model.model."  # what PEFT puts before a base model's names
LAYERS = f"{PREFIX}model.layers"  # the blocks of a Llama
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_PROJECTIONS = 14  # of the two blocks of `tiny_llama`
# What bitsandbytes is asked for.
QUANTISED = {"4-bit": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "8-bit": {"load_in_8bit": True}}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # of GPT-2
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 numbers share a scale in 4 bits

Document = dict[str, list[int]]


def llama_config(**config: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**sizes, **config})


def seeded(kind: Callable[[Any], PreTrainedModel], config: Any, seed: int = 0) -> Any:
    """A model of random weights, large enough that its outputs depend on its inputs; train mode, as in training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.train()


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    return seeded(LlamaForCausalLM, llama_config(**config), seed)


def tiny_gpt2(seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """Conv1D layers, and nn.Dropout of 0.1 by default."""
    sizes = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return seeded(GPT2LMHeadModel, GPT2Config(**{**sizes, **config}), seed)


def tiny_opt(seed: int = 0, **config: Any) -> OPTForCausalLM:
    """Functional dropouts, and whole layers left out at random (layerdrop)."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return seeded(OPTForCausalLM, OPTConfig(**{**sizes, **config}), seed)


def tiny_mixtral(seed: int = 0, **config: Any) -> MixtralForCausalLM:
    """Experts as parameter tensors, and a router with jitter."""
    sizes = {
        **llama_config().to_diff_dict(),
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "experts_implementation": "eager",
    }
    sizes.pop("model_type", None)
    return seeded(MixtralForCausalLM, MixtralConfig(**{**sizes, **config}), seed)


def quantized(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The model as bitsandbytes loads it for users; `folder` takes the original, which must be at least 64 wide."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=BitsAndBytesConfig(**config), dtype=dtype)


def tiny_quantized(folder: Path, **config: Any) -> LlamaForCausalLM:
    return quantized(tiny_llama(**WIDE), folder, **config)


def lora(**config: Any) -> LoraConfig:
    """An adapter's config, for all linear layers unless told otherwise."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config})


def with_lora(model: PreTrainedModel, seed: int = 0, **config: Any) -> PeftModel:
    """A fresh adapter in the model itself; whoever wants the same weights without one makes the model anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, lora(**config))


def documents(
    lengths: int | Sequence[int], seed: int = 0, shortest: int = 4, longest: int = 12, prompt: int = 2
) -> list[Document]:
    """Random documents, the first `prompt` tokens of each without loss.

    Args:
        lengths: of each document; or how many there are, of lengths from `shortest` to `longest`.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [None] * lengths if isinstance(lengths, int) else lengths
    found = []
    for length in chosen:
        if length is None:
            length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return found


def pad(rows: Iterable[Document], side: str = "right") -> dict[str, Tensor]:
    """A collator: one batch with an attention mask; the rows are not changed."""
    rows = list(rows)
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        filling = [fill] * (width - len(values))
        return [*values, *filling] if side == "right" else [*filling, *values]

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], PADDING) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def batches(rows: Sequence[Document], batch_size: int, side: str = "right") -> list[dict[str, Tensor]]:
    return [pad(rows[first : first + batch_size], side) for first in range(0, len(rows), batch_size)]


def few_tokens(rows: Sequence[Document]) -> list[Document]:
    """The same documents of a few tokens only, so that what is learnt of some helps with the others."""
    return [{key: [i if i < 0 else i % 12 + 3 for i in value] for key, value in row.items()} for row in rows]


def packed(rows: Sequence[Document]) -> dict[str, Tensor]:
    """One row that holds all documents, told apart by position_ids; no document predicts the next one's first token."""
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in rows for label in [IGNORED, *row["labels"][1:]]]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row["input_ids"]))]]),
    }


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of them."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def checkpoint(model: PreTrainedModel, reentrant: bool = False) -> None:
    """Switch activation checkpointing on, by the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})


def lived_in(model: PeftModel) -> PeftModel:
    """A model in a state that no default would restore: mixed flags, gradients, hooks and attributes of its user."""
    base = model.get_base_model()
    modules = [module for module in base.modules() if not list(module.children())]
    for number, module in enumerate(modules):
        module.training = number % 3 != 0
    for number, parameter in enumerate(model.parameters()):
        if parameter.is_floating_point():
            parameter.requires_grad_(number % 2 == 0)
        if number % 3 == 0 and parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
    modules[0].register_forward_hook(lambda module, args, output: None)
    modules[1].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    modules[2].register_forward_pre_hook(lambda module, args: None)
    base.mark_of_the_user = "kept"
    base.config.use_cache = True
    return model


class Stream(IterableDataset):
    """Starts anew with each iteration."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class OwnIterator(IterableDataset):
    """Its own iterator: what is taken is gone."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


class HeldIterator(OwnIterator):
    """Hands out one iterator again and again."""

    def __iter__(self):
        return self.rows
