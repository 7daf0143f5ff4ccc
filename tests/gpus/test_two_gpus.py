"""A model on two GPUs in one process, as `device_map` leaves it: the numbers of one device, with none that is there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from classifiers import K, adapted, classifier, single, tagged
from classifiers import in_batches as classified
from dequantized import four_bit
from fake_cuda import GIB, fake_gpus
from models import WIDE, adapter_weights, batches, documents, tiny_llama, with_lora
from peft import PeftModel
from planning import Forced, Way
from rewards import in_batches as paired
from rewards import pairs, reward_model
from tolerances import REBATCHED, REORDERED
from torch import nn
from transformers import PreTrainedModel

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.model.blocks import find_blocks
from lora_da.report import InitReport
from lora_da.tasks import RewardLoss

GPUS = "cuda:0", "cuda:1"
ROWS = batches(documents(40), 4)
BLOCKS = 4

Made = tuple[dict[str, torch.Tensor], InitReport]


def llama(**config: Any) -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=BLOCKS, **config)


def on_two(model: PreTrainedModel, head: int = 1) -> PreTrainedModel:
    """The upper half of the blocks and the norm above on the second GPU, with the head or without."""
    lower = find_blocks(model)[:2]
    devices = {}
    for name, module in model.named_modules():
        if next(module.children(), None) is None or isinstance(module, type(lower[0])):
            above = name.endswith(("layers.2", "layers.3", "model.norm"))
            in_head = name.startswith(("lm_head", "score"))
            devices[name] = GPUS[head if in_head else int(above)]
    inside = [name for name in devices if any(name.startswith(f"{block}.") for block in devices)]
    return dispatch_model(model, {name: device for name, device in devices.items() if name not in inside})


def initialised(model: PeftModel, rows: Any = ROWS, way: Way | None = None, **settings: Any) -> Made:
    """The adapter that it is given, copied to the CPU, and the report."""
    reward = settings.pop("reward", None)
    if settings.get("method") is None:
        settings = {"population_size": 1000, "first_step": "gamma", **settings}
    config = LoraDAConfig(**{"samples": 12, **settings})
    plan = {} if way is None else {"plan": Forced(way)}
    report = initialize_lora_da_weights(model, rows, config, show_progress=False, reward=reward, **plan)
    return {name: value.cpu() for name, value in adapter_weights(model).items()}, report


def check_same(found: Made, expected: Made, tolerance: float) -> None:
    assert found[1].initialized == expected[1].initialized == found[1].targeted
    assert found[1].loss == pytest.approx(expected[1].loss, rel=tolerance, abs=0)
    for name, value in expected[0].items():
        assert torch.linalg.norm((found[0][name] - value).double()) <= tolerance * torch.linalg.norm(value.double())


def check_on_two(
    make: Callable[[], PreTrainedModel],
    adapt: Callable[[PreTrainedModel], PeftModel] = with_lora,
    head: int = 1,
    tolerance: float = 0.0,
    **settings: Any,
) -> None:
    expected = initialised(adapt(make()), **settings)
    with fake_gpus(2) as gpus:
        found = initialised(adapt(on_two(make(), head)), **settings)
    check_same(found, expected, tolerance)
    assert len(gpus.peak) == 2 and min(gpus.peak.values()) > 0.3 * max(gpus.peak.values())


@pytest.mark.compat("device-map")
@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("preset", ["default", "reference"])
def test_every_preset_wherever_the_head_is(preset: str, head: int) -> None:
    """Under `reference` each token has a weight of its own, under `default` the first step is measured."""
    check_on_two(llama, head=head, preset=preset, first_step="measured")


@pytest.mark.parametrize("method", ["filet", "cntlora", "lora_ga"])
def test_other_methods(method: str) -> None:
    check_on_two(llama, method=method)


def test_a_head_that_is_tied_to_the_embeddings() -> None:
    check_on_two(lambda: llama(tie_word_embeddings=True), head=0)


def test_a_head_that_is_served() -> None:
    check_on_two(llama, lambda base: with_lora(base, target_modules=["q_proj", "lm_head"]))


def test_several_passes() -> None:
    check_on_two(llama, way=Way(parts=3, cut=False))


def test_half_precision() -> None:
    check_on_two(lambda: llama().to(torch.bfloat16), tolerance=REORDERED)


def test_four_bit(tmp_path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = four_bit(llama(**WIDE), tmp_path, "double-quantisation")
    check_on_two(lambda: copy.deepcopy(base))


def test_classifiers_and_reward_models() -> None:
    tokens, sequences = classifier("Llama", "Token", num_hidden_layers=BLOCKS), single(20)
    assert tokens.num_labels == K
    check_on_two(
        lambda: classifier("Llama", "Token", num_hidden_layers=BLOCKS),
        adapted,
        rows=classified(tagged(20), 4),
        preset="reference",
    )
    check_on_two(lambda: classifier("Llama", num_hidden_layers=BLOCKS), adapted, rows=classified(sequences, 4))
    check_on_two(
        lambda: reward_model(num_hidden_layers=BLOCKS), adapted, rows=paired(pairs(20), 4), reward=RewardLoss(None)
    )


def test_the_fuller_gpu_decides() -> None:
    """The plan is made for the least memory that is free on any of them."""
    expected = initialised(with_lora(llama()))
    with fake_gpus(2, memory=GIB) as gpus:
        model = with_lora(on_two(llama()))
        beside = torch.zeros(GIB - gpus.live[torch.device(GPUS[1])] - 250_000, dtype=torch.uint8, device=GPUS[1])
        found = initialised(model)
    assert "passes (not streamed: its blocks are on several devices (cuda:0, cuda:1))" in found[1].plan
    assert beside.nbytes and found[1].initialized == expected[1].initialized
    check_same(found, expected, REBATCHED)


def test_embeddings_that_are_kept_on_the_cpu() -> None:
    """Samples go, and memory is planned, where the blocks are, as for embeddings that fetch their input themselves."""

    def offloaded(model: PeftModel) -> PeftModel:
        embeddings: nn.Module = model.to("cuda").get_base_model().get_input_embeddings().to("cpu")
        embeddings.register_forward_pre_hook(lambda _module, args: (args[0].cpu(),))
        embeddings.register_forward_hook(lambda _module, _args, output: output.to("cuda"))
        return model

    expected = initialised(with_lora(llama()))
    with fake_gpus():
        found = initialised(offloaded(with_lora(llama())))
    check_same(found, expected, 0.0)
    assert found[1].memory_of == "GPU"
