"""Random configurations: an architecture, an adapter, a quantisation, data and a trainer, all of rows that are tested,
now and then with one thing that a row of the table refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from architectures import ARCHITECTURES, Architecture
from datasets import Dataset
from dequantized import FOUR_BIT, dequantized, four_bit
from hypothesis import strategies as st
from models import IGNORED, Document, checkpoint, documents, packed, pad, with_lora
from peft import PeftModel
from settings import as_solved
from torch import nn
from torch.utils.data import DataLoader
from trainers import plain, sft
from transformers import PreTrainedModel

from lora_da import initialize_lora_da_weights
from lora_da.report import InitReport
from trl_integration import LoraDAInitializer

DENSE = ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3"]  # those that are quantised here
ROW_OF = {"Gemma2": "gemma2", "Gemma3Text": "gemma3", "GPTNeoX": "gpt-neox", "Qwen2Moe": "qwen-moe"}
ROW_OF |= {"Qwen3Moe": "qwen-moe"}

# What a refused row says, by the row's key.
SENTENCES = {
    "other-init": "^init_lora_weights='eva' already chooses the start of the adapter; leave it at True or 'gaussian'",
    "wide-rank": "^layer .* its rank 200 is above that; set a smaller `r`",
    "merged": "^layer .* has merged adapters; call `unmerge_adapter",
    "images": "^the batches hold pixel_values: .*initialise on text rows instead",
    "label-smoothing": "^label_smoothing_factor=0.1: .*set it to 0",
    "other-losses": "^loss_type='dft': .*set 'nll'",
}
TRAINERS = {
    "peft-call": ["other-init", "wide-rank", "merged", "images"],
    "trainer": ["other-init", "wide-rank", "label-smoothing"],
    "sft": ["other-init", "wide-rank", "label-smoothing", "other-losses"],
}


@dataclass(frozen=True)
class Configuration:
    """One draw.

    Args:
        targets: numbers of the linear layers' names to target; none for all of them.
        lengths: shortest and longest document.
        samples: how many documents are counted.
        silent: numbers of documents without a token that carries loss.
        budget: GiB; little enough makes it streamed.
        refusal: the row of what is wrong with it.
    """

    family: str
    blocks: int
    hidden: int
    tied: bool
    quantisation: str | None
    rank: int
    alpha: int
    lora: tuple[tuple[str, Any], ...]
    targets: frozenset[int]
    rank_pattern: bool
    count: int
    lengths: tuple[int, int]
    prompt: int
    samples: int
    silent: frozenset[int]
    packing: bool
    batch_size: int
    checkpointing: bool | None
    budget: float | None
    trainer: str
    seed: int
    refusal: str | None

    @property
    def rows(self) -> set[str]:
        """The rows of the table that it is made of, but for the one that refuses it."""
        found = {self.trainer, ROW_OF.get(self.family, self.family.lower()), self.quantisation or "float32"}
        found |= {"rslora"} if dict(self.lora).get("use_rslora") else set()
        found |= {"gaussian"} if "init_lora_weights" in dict(self.lora) else set()
        found |= {"rank-pattern"} if self.rank_pattern else set()
        found |= {"conv1d"} if self.family == "GPT2" else {"lora"}
        found |= {"tied-weights"} if self.tied else set()
        found |= {"trl-packing"} if self.packing and self.trainer == "sft" else set()
        return found | ({"checkpointing"} if self.checkpointing is not None else set())

    def documents(self) -> list[Document]:
        rows = documents(self.count, self.seed, *self.lengths, self.prompt)
        masked = [IGNORED]
        return [
            {**row, "labels": masked * len(row["labels"])} if n in self.silent else row for n, row in enumerate(rows)
        ]

    def counted(self) -> list[Document]:
        """Those that are to be counted."""
        return [row for row in self.documents() if any(v != IGNORED for v in row["labels"][1:])][: self.samples]

    def base(self) -> PreTrainedModel:
        base = architecture(self.family, self.blocks, self.hidden, self.tied)
        return base.base() if self.quantisation is None else quantised(base, self.quantisation)

    def adapter(self, base: PreTrainedModel) -> PeftModel:
        leaves = sorted({name.split(".")[-1] for name, m in base.named_modules() if is_targeted(name, m)})
        allowed = ARCHITECTURES[self.family].targets
        names = leaves if isinstance(allowed, str) else allowed
        chosen = sorted({names[n % len(names)] for n in self.targets}) or names
        settings = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": chosen, **dict(self.lora)}
        if self.rank_pattern:
            settings["rank_pattern"] = {chosen[0]: self.rank + 1}
        if self.refusal == "wide-rank":
            settings["r"] = 200
        model = with_lora(base, self.seed, **settings)
        if self.refusal == "other-init":
            model.peft_config["default"].init_lora_weights = "eva"  # PEFT itself wants data to build it
        if self.refusal == "merged":
            model.merge_adapter()
        return model

    def start(self, model: PeftModel, output: Path) -> InitReport:
        """Initialise the adapter as this configuration's trainer does."""
        config = as_solved(samples=self.samples, population_size=self.count, memory_budget=self.budget)
        if self.trainer == "peft-call":
            if self.checkpointing is not None:
                checkpoint(model.get_base_model(), self.checkpointing)
            loader = DataLoader(self.documents(), self.batch_size, collate_fn=self.collate)  # type: ignore[arg-type]
            return initialize_lora_da_weights(model, loader, config, show_progress=False)
        initializer = LoraDAInitializer(config)
        args: dict[str, Any] = {"learning_rate": 0.0, "bf16": False, "per_device_train_batch_size": self.batch_size}
        args |= {"gradient_checkpointing": self.checkpointing is not None}
        if self.checkpointing is not None:
            args["gradient_checkpointing_kwargs"] = {"use_reentrant": self.checkpointing}
        args |= {"label_smoothing_factor": 0.1} if self.refusal == "label-smoothing" else {}
        if self.trainer == "sft":
            args |= {"packing": True, "max_length": 32} if self.packing else {}
            args |= {"loss_type": "dft"} if self.refusal == "other-losses" else {}
            trainer = sft(model, Dataset.from_list(self.documents()), output, initializer, **args)
        else:
            trainer = plain(model, self.documents(), output, initializer, **args)
            trainer.data_collator = self.collate
        trainer.train()
        assert initializer.report is not None
        return initializer.report

    def collate(self, rows: list[Document]) -> dict[str, torch.Tensor]:
        batch = packed(rows) if self.packing else pad(rows)
        if self.refusal == "images":
            batch["pixel_values"] = torch.zeros(len(rows), 3, 8, 8)
        return batch


def is_targeted(name: str, module: nn.Module) -> bool:
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and not name.endswith(("lm_head", "embed_out"))


@lru_cache
def architecture(family: str, blocks: int, hidden: int, tied: bool) -> Architecture:
    """A family's tiny config in another size."""
    plain = ARCHITECTURES[family]
    config = {**plain.config, "tie_word_embeddings": tied}
    config |= {"n_layer": blocks, "n_embd": hidden} if family == "GPT2" else {"num_hidden_layers": blocks}
    if family != "GPT2":
        config |= {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:blocks]
    if "max_window_layers" in config:
        config["max_window_layers"] = blocks // 2
    return replace(plain, config=config)


def quantised(original: Architecture, kind: str) -> PreTrainedModel:
    with TemporaryDirectory() as folder:
        return four_bit(original.base(), Path(folder), kind).train()


def twin(base: PreTrainedModel, configuration: Configuration) -> PreTrainedModel:
    """The same model, unquantised: what each quantised layer dequantises to."""
    c = configuration
    dense = architecture(c.family, c.blocks, c.hidden, c.tied).base()
    return dense if c.quantisation is None else dequantized(base, dense)


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    quantisation = draw(st.sampled_from([None, None, *FOUR_BIT]))
    trainer = draw(st.sampled_from(list(TRAINERS)))
    count = draw(st.integers(3, 12))
    packing = draw(st.booleans())
    shortest = draw(st.integers(3, 6))
    prompt = draw(st.integers(0, 2))
    family = draw(st.sampled_from(DENSE if quantisation else list(ARCHITECTURES)))
    refusals = [None] * 12 + TRAINERS[trainer]
    return Configuration(
        family=family,
        blocks=draw(st.integers(1, 4)),
        hidden=64 if quantisation else draw(st.sampled_from([32, 64])),
        tied=draw(st.booleans()),
        quantisation=quantisation,
        rank=draw(st.integers(1, 8)),
        alpha=draw(st.integers(1, 32)),
        lora=draw(
            st.sampled_from(
                [
                    (),
                    (("use_rslora", True),),
                    (("init_lora_weights", "gaussian"),),
                    (("lora_dropout", 0.2), ("use_rslora", True)),
                ]
            )
        ),
        targets=draw(st.frozensets(st.integers(0, 6), max_size=3)),
        rank_pattern=draw(st.booleans()),
        count=count,
        lengths=(shortest, shortest + draw(st.integers(0, 14))),
        prompt=prompt,
        samples=count if packing and trainer == "sft" else draw(st.integers(2, count)),
        silent=draw(st.frozensets(st.integers(1, count - 1), max_size=2)),
        packing=packing,
        batch_size=draw(st.integers(1, 5)),
        checkpointing=draw(st.sampled_from([None, True, False])),
        budget=draw(st.sampled_from([None, 4.0, 1e-3, 1e-4])),
        trainer=trainer,
        seed=draw(st.integers(0, 10**6)),
        refusal=draw(st.sampled_from(refusals)),
    )
