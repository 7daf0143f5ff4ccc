"""FSDP2, set up by accelerate's own function; accelerate itself uses it on GPUs only, so its plugin is handed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from many_cases import ROWS, SAMPLES, Broken, fails_in, llama, process_group, rank
from models import WIDE, batches, checkpoint, tiny_llama, with_lora
from other_methods import METHODS
from peft import PeftModel
from planning import Forced, Way
from stacks import stacked, with_experts, without_expert
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.collect.segment import SegmentRun


def sharded(model: PeftModel, block: str | None = None, reshard: bool = True) -> PeftModel:
    """Shard the model as the Trainer's accelerator does, by blocks of that class; of its decoder's if None."""
    block = block or type(model.get_base_model().model.layers[0]).__name__
    kind = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[block],
        reshard_after_forward=reshard,
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=kind),
        mixed_precision="no",
        is_main_process=rank() == 0,
        device=torch.device("cpu"),
    )
    dist.init_device_mesh("cpu", (dist.get_world_size(),))
    return fsdp2_prepare_model(accelerator, model)


def whole_adapter(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    return found


def initialized(model: PeftModel, way: Way, **settings: Any) -> dict[str, Any]:
    population = None if "method" in settings else 1000
    settings = settings if "method" in settings else {"first_step": "gamma", **settings}
    config = LoraDAConfig(population_size=population, samples=SAMPLES, **settings)
    kinds = {name: type(p) for name, p in model.named_parameters()}
    report = initialize_lora_da_weights(model, batches(ROWS, 3), config, show_progress=False, plan=Forced(way))
    return {
        "adapter": whole_adapter(model),
        "loss": report.loss,
        "gradient norms": report.gradient_norms,
        "tried": None if report.first_step is None else report.first_step.tried,
        "from cache": report.from_cache,
        "steps": {name: layer.relative_step for name, layer in report.layers.items()},
        "same parameters": kinds == {name: type(p) for name, p in model.named_parameters()},
        "trained": trained(model),
    }


def trained(model: PeftModel) -> dict[str, Tensor]:
    """One step of training afterwards: gradients arrive where they did before."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = batches(ROWS, SAMPLES)[0]
    model(**batch).loss.backward()
    optimizer.step()
    return whole_adapter(model)


def nf4(folder: Path, storage: torch.dtype) -> PeftModel:
    """4-bit weights kept as bytes, which FSDP2 leaves whole, or as bfloat16 numbers, which it shards."""
    if rank() == 0:
        tiny_llama(**WIDE, num_hidden_layers=4).save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage)
    return with_lora(AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization))


def checkpointed() -> PeftModel:
    model = llama()
    checkpoint(model.get_base_model())
    model.enable_input_require_grads()
    return model


def tied() -> PeftModel:
    return with_lora(tiny_llama(num_hidden_layers=4, tie_word_embeddings=True))


def headed() -> PeftModel:
    """An adapter that has layers outside the blocks too."""
    return with_lora(tiny_llama(num_hidden_layers=4), target_modules=["q_proj", "lm_head"])


MODELS: dict[str, Callable[[Path], PeftModel]] = {
    "float32": lambda _: llama(),
    "checkpointing": lambda _: checkpointed(),
    "tied weights": lambda _: tied(),
    "experts in one parameter": lambda _: without_expert(1),
    "nf4 in bytes": lambda folder: nf4(folder / "bytes", torch.uint8),
    "nf4 in bfloat16": lambda folder: nf4(folder / "bfloat16", torch.bfloat16),
}
MEASURED = {"first_step": "measured"}
TO_MEASURE = {
    "float32": MODELS["float32"],
    "nf4 in bytes": MODELS["nf4 in bytes"],
    "head": lambda _: headed(),
    "experts": lambda _: with_experts(stacked("GptOss")),
}
KEPT = ("lora_da", "cntlora")  # with parameters that stay gathered after a forward
WAYS = {"one pass": Way(), "3 segments": Way(cuts=3), "3 passes": Way(parts=3, cut=False)}


def fsdp2(folder: Path) -> dict[str, Any]:
    with process_group():
        found = {name: initialized(sharded(model(folder)), Way(cuts=3)) for name, model in MODELS.items()}
        ways = {name: initialized(sharded(llama()), way) for name, way in WAYS.items()}
        methods = {name: initialized(sharded(llama()), Way(cuts=3), method=name) for name in METHODS}
        kept = {f"{m} kept": initialized(sharded(llama(), reshard=False), Way(cuts=3), method=m) for m in KEPT}
        measured = {
            f"measured, {name}": initialized(sharded(build(folder)), Way(), **MEASURED)
            for name, build in TO_MEASURE.items()
        }
        return {**found, **ways, **methods, **kept, **measured, "cache": cached(folder / "cache")}


def cached(folder: Path) -> list[dict[str, Any]]:
    """A run that keeps its solution and one that finds it."""
    return [initialized(sharded(llama()), Way(), cache_dir=str(folder)) for _ in range(2)]


def dies(folder: Path) -> None:
    """One process fails in a forward, in which the others wait for it."""
    with process_group(), pytest.MonkeyPatch.context() as patch:
        fails_in(patch, SegmentRun, "_run_top", 1, Broken("the fault of one process"))
        initialized(sharded(llama()), Way())
