"""What is measured on: a causal language model, 4-bit or bf16, and the samples, the same for every entry.

`smollm2` is a real model on real questions. The others are Llamas of random weights on random tokens: what a pass
costs depends on shapes, not on values (a solver's iterations may depend on values).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel

from benchmarks.qlora import load_model, lora_config
from benchmarks.random_llama import random_llama
from benchmarks.tokenized_rows import Row, gsm8k_rows, random_rows
from examples.smollm2 import prepare
from lora_da.samples.rows import collate

RANK = 8


@dataclass(frozen=True)
class Subject:
    """A model's shape and the samples' size.

    Args:
        name: `smollm2` for the real model; any other name needs `config`.
        config: the shape of a Llama with random weights.
        samples, length: how many rows, and tokens in each (of real text: at most).
        batch_size: rows in a batch of the loader.
    """

    name: str
    config: LlamaConfig | None
    samples: int
    length: int
    batch_size: int = 8

    def build(self, base: str, device: torch.device) -> PreTrainedModel:
        """Build the model on the device, `nf4` or `bf16`, as it is trained: bf16 activations, sdpa attention,
        non-reentrant gradient checkpointing, train mode."""
        model = load_model(prepare(), base, device) if self.config is None else random_llama(self.config, base, device)
        model.config.use_cache = False
        # by the name that this version of transformers has for it
        checkpoint = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        checkpoint({"use_reentrant": False})
        return model.train()

    def rows(self) -> list[Row]:
        """Read or draw the samples, the same ones at each call."""
        if self.config is None:
            return gsm8k_rows(self.samples, self.length, AutoTokenizer.from_pretrained(prepare()))
        return random_rows(self.samples, self.length, self.config.vocab_size)

    def loader(self) -> DataLoader[Row]:
        """Hand the samples over as a trainer would."""
        return DataLoader(self.rows(), self.batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def resized(self, samples: int | None, length: int | None, batch_size: int | None) -> Subject:
        """Take the same model on other samples; None keeps what is set."""
        return replace(
            self,
            samples=samples or self.samples,
            length=length or self.length,
            batch_size=batch_size or self.batch_size,
        )


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> LlamaConfig:
    """Shape a Llama, output layer untied."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("smollm2", None, samples=64, length=256),
        Subject("llama-2-7b", llama(4096, 11008, 32, 32, 32, 32000), samples=256, length=512),
        Subject("llama-3.1-8b", llama(4096, 14336, 32, 32, 8, 128256), samples=256, length=512),
        Subject("tiny", llama(64, 192, 4, 4, 2, 512), samples=16, length=32, batch_size=4),
    )
}


def with_lora(model: PreTrainedModel) -> PeftModel:
    """Put a fresh adapter on a model, the same for every entry."""
    return get_peft_model(model, lora_config(RANK))
