"""PEFT's own data-aware initialisations, called as PEFT documents them, for their cost.

Both leave the model changed (EVA on a CPU repacks 4-bit weights for inference, LoRA-GA moves the base), so each is the
last entry on its model.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from peft import EvaConfig, LoraGAConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from benchmarks.qlora import ALPHA_OVER_R, lora_config
from benchmarks.subjects import RANK

EVA_PASSES = 5  # EVA goes on over the samples until every component has converged; stopped, and said so, beyond this


def eva_adapter(model: PreTrainedModel, rank: int, alpha_over_r: float = ALPHA_OVER_R) -> PeftModel:
    """Put on an adapter that EVA may fill: without redistribution of ranks, so that it is the same as the others'."""
    config = lora_config(rank, alpha_over_r, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    return get_peft_model(model, config, low_cpu_mem_usage=True)


def linear_names(model: PreTrainedModel) -> set[str]:
    """Name what `all-linear` stands for, where PEFT looks for targets before it knows that word."""
    head = model.get_output_embeddings()
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return {name.rpartition(".")[2] for name in linear}


class _Stopped(Exception):
    pass


class Eva:
    """EVA, its forwards counted, and stopped where they are too many.

    Args:
        peft_model: its adapter is replaced by one that EVA may fill.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        self._model = eva_adapter(peft_model.unload(), RANK)

    def run(self, loader: DataLoader[Any]) -> dict[str, Any]:
        """Initialise, and say how many forwards it took and whether it ended by itself."""
        forwards = 0

        def forward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
            nonlocal forwards
            if forwards >= EVA_PASSES * len(loader):
                raise _Stopped
            forwards += 1
            model(**inputs)

        with contextlib.suppress(_Stopped):
            initialize_lora_eva_weights(self._model, loader, forward_fn=forward, show_progress_bar=False)
        converged = forwards < EVA_PASSES * len(loader)
        end = "converged" if converged else "stopped, not converged"
        return {
            "forwards": forwards,
            "converged": converged,
            "note": f"{end} after {forwards} forwards over {len(loader)} batches",
        }


class LoraGA:
    """LoRA-GA with PEFT's defaults, on an unquantised model.

    Args:
        peft_model: its adapter is taken off; LoRA-GA starts from the plain model.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        self._model = peft_model.unload()
        self._config = lora_config(RANK, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        self._config.target_modules = linear_names(self._model)

    def run(self, loader: DataLoader[Any], device: torch.device) -> dict[str, Any]:
        """Estimate the gradients over all batches, then start the adapter from them; the seconds of both."""

        def passes() -> None:
            for batch in loader:
                self._model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()

        started = time.perf_counter()
        preprocess_loraga(self._model, self._config, passes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        between = time.perf_counter()
        get_peft_model(self._model, self._config)
        return {"timings": {"gradient": between - started, "solve": time.perf_counter() - between}}
