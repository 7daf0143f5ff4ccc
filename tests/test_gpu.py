"""On a CUDA GPU an adapter starts as on the CPU, in the memory that was forecast, and nothing is left behind.

Starts are compared with that of the same model in float64 on the CPU. `LORA_DA_GPU_TESTS=cpu` runs all but the tests of
a GPU's own memory on the CPU, where they can be tried.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    QUANTISED,
    WIDE,
    Document,
    adapter_weights,
    checkpoint,
    documents,
    few_tokens,
    lived_in,
    pad,
    tiny_llama,
)
from models import with_lora as adapted
from peft import PeftModel
from picture import differences, picture
from planning import ONE, WAYS, Demanded, Way
from settings import as_solved
from tolerances import TURNED
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lora_da import InitReport, LoraDAConfig, initialize_lora_da_weights
from lora_da.collect import Planner, make_plan
from lora_da.collect.plan import in_segments
from lora_da.memory import GIB
from lora_da.methods import METHODS
from lora_da.methods.presets import PRESETS

DEVICE = torch.device(os.environ.get("LORA_DA_GPU_TESTS", "cuda"))
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]
MEMORY = pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU's allocator counts no peak")

ROWS = documents(28, longest=32)
SAMPLES = 12
BLOCKS = 4
SOLVED = as_solved(samples=SAMPLES)
# nf4's scales are rounded to 8 bits themselves, and at a tie a GPU may round one the other way than a CPU.
QUANTISED_ELSEWHERE = 0.05
EIGHT_BITS = 0.2  # activations are rounded to 8 bits too, on a GPU after they were cast to float16
# By preset: a damping of 1e-6 lets a condition number through that takes three more digits of float32 sums than 0.1.
DAMPED = {"default": TURNED, "reference": 10 * TURNED, "paper": 10 * TURNED}
OTHER = 0.5  # what other samples move a start by at least
WORKSPACE = 2**26  # bytes that cuBLAS and cuSOLVER take of torch's allocator, once, for their own use
SMALL = 1 / GIB  # a budget that holds not even one block


def model(device: torch.device, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    return adapted(tiny_llama(**WIDE, num_hidden_layers=BLOCKS).to(device, dtype), **lora)


def started(
    on: PeftModel, config: LoraDAConfig = SOLVED, plan: Planner = make_plan, rows: list[Document] = ROWS
) -> InitReport:
    loader = DataLoader(rows, 4, collate_fn=pad)
    report = initialize_lora_da_weights(on, loader, config, show_progress=False, plan=plan)
    assert report.initialized == report.targeted == 7 * BLOCKS and not report.failed
    return report


def start(on: PeftModel, config: LoraDAConfig = SOLVED, plan: Planner = make_plan) -> dict[str, Tensor]:
    started(on, config, plan)
    return {name: tensor.double().cpu() for name, tensor in adapter_weights(on).items()}


@functools.cache
def truth(config: LoraDAConfig = SOLVED) -> dict[str, Tensor]:
    return start(model(CPU, torch.float64), config)


def farthest(one: dict[str, Tensor], other: dict[str, Tensor], steps: bool = True) -> float:
    """The largest relative difference, over the layers, of the space that lora_A reads, and of lora_B @ lora_A."""
    assert one and set(one) == set(other)
    found = []
    for name in (name for name in other if "lora_A" in name):
        pairs = [(s[name], s[name.replace("lora_A", "lora_B")]) for s in (one, other)]
        bases = [torch.linalg.qr(lora_A.T).Q for lora_A, _ in pairs]
        found.append((bases[0] @ bases[0].T, bases[1] @ bases[1].T))
        if steps and pairs[1][1].any():
            found.append((pairs[0][1] @ pairs[0][0], pairs[1][1] @ pairs[1][0]))
    return max(((a - b).norm() / b.norm()).item() for a, b in found)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    config = as_solved(samples=SAMPLES, preset=preset)
    found = start(model(DEVICE), config)
    assert farthest(found, truth(config)) <= DAMPED[preset]
    other = start(model(DEVICE), as_solved(samples=SAMPLES // 2, preset=preset))
    assert farthest(other, truth(config)) > OTHER


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    """LoRA-GA's lora_B is of other directions than its lora_A, so that the sign of their product is anyone's."""
    config = SOLVED if method == "lora_da" else LoraDAConfig(method=method, samples=SAMPLES)
    assert farthest(start(model(DEVICE), config), truth(config), steps=method != "lora_ga") <= TURNED


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_plans(way: Way, checkpointing: bool) -> None:
    on = model(DEVICE)
    if checkpointing:
        checkpoint(on.get_base_model())
    assert farthest(start(on, plan=Demanded(way)), truth()) <= TURNED


def test_a_small_budget_gives_several_passes() -> None:
    on, config = model(DEVICE), as_solved(samples=SAMPLES, memory_budget=SMALL)
    assert "times" in started(on, config).plan
    found = {name: tensor.double().cpu() for name, tensor in adapter_weights(on).items()}
    assert farthest(found, truth()) <= TURNED


@pytest.mark.parametrize("plan", [ONE, Way(cuts=2)], ids=["one pass", "streamed"])
@pytest.mark.parametrize("kind", ["bf16", "bf16 autocast", "fp16 autocast"])
def test_low_precision_is_as_close_as_bf16_on_the_cpu(kind: str, plan: Way) -> None:
    """A GPU sums products of 16 bits in float32 and rounds what a layer returns once, as the CPU does."""

    def found_on(device: torch.device, kind: str) -> float:
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if "autocast" in kind:
            autocast = torch.autocast(device.type, torch.bfloat16 if kind.startswith("bf16") else torch.float16)
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        with autocast:
            return farthest(start(model(device, dtype), plan=Demanded(plan)), truth())

    assert found_on(DEVICE, kind) <= 2 * found_on(CPU, kind.replace("fp16", "bf16"))


def quantised(folder: Path, kind: str, device: torch.device) -> PeftModel:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_llama(**WIDE, num_hidden_layers=BLOCKS).save_pretrained(folder)
    config = BitsAndBytesConfig(**QUANTISED[kind])
    loaded = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": device}
    )
    return adapted(loaded.train())


@pytest.mark.parametrize("way", [ONE, WAYS["2 segments"], WAYS["3 passes"]], ids=["one pass", "streamed", "3 passes"])
def test_four_bits(tmp_path: Path, way: Way) -> None:
    found = start(quantised(tmp_path, "4-bit", DEVICE), plan=Demanded(way))
    assert farthest(found, start(quantised(tmp_path, "4-bit", CPU))) <= QUANTISED_ELSEWHERE
    assert farthest(found, truth()) > OTHER  # four bits move the start: they are in it


def test_eight_bits(tmp_path: Path) -> None:
    found = start(quantised(tmp_path, "8-bit", DEVICE))
    assert farthest(found, start(quantised(tmp_path, "8-bit", CPU))) <= EIGHT_BITS


def test_the_first_step_is_measured() -> None:
    config, rows = LoraDAConfig(samples=SAMPLES), few_tokens(ROWS)
    found = started(model(DEVICE), config, rows=rows).first_step
    expected = started(model(CPU, torch.float64), config, rows=rows).first_step
    assert found is not None and expected is not None
    assert found.length == expected.length and found.loss_after <= found.loss_before
    assert torch.allclose(torch.tensor(found.tried), torch.tensor(expected.tried), rtol=TURNED)


@pytest.mark.parametrize("way", [ONE, WAYS["2 segments in 3 parts"]], ids=["one pass", "streamed in parts"])
def test_nothing_but_the_factors_changes(way: Way) -> None:
    """Weights, gradients, flags, hooks, attributes, and the random states of the CPU and of the GPU."""
    on = lived_in(model(DEVICE, lora_dropout=0.1))
    on_gpu = DEVICE.type == "cuda"
    before, states = picture(on), torch.cuda.get_rng_state_all() if on_gpu else []
    report = started(on, as_solved(samples=SAMPLES), Demanded(way))
    changed = sorted(f"{layer}.lora_{factor}.default.weight: bits" for layer in report.layers for factor in "AB")
    assert sorted(differences(before, picture(on))) == changed
    assert all(torch.equal(a, b) for a, b in zip(states, torch.cuda.get_rng_state_all() if on_gpu else [], strict=True))


def wide(dtype: torch.dtype = torch.bfloat16) -> PeftModel:
    """Large enough that its sums and activations are more than what libraries take."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_hidden_layers": 6}
    return adapted(tiny_llama(**sizes).to(DEVICE, dtype))


def long_rows() -> DataLoader:
    return DataLoader(documents([256] * 16), 4, collate_fn=pad)


@contextlib.contextmanager
def capped(beyond: int) -> Iterator[None]:
    """Leave torch so many bytes beyond what it has handed out."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated(DEVICE) + beyond) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def estimated(on: PeftModel, segments: int | None = None, rows: int = 16) -> tuple[InitReport, int]:
    """The report, and the bytes that were forecast beside the model."""
    torch.cuda.empty_cache()
    used, planner = torch.cuda.memory_allocated(DEVICE), make_plan if segments is None else in_segments(segments)
    report = initialize_lora_da_weights(on, long_rows(), as_solved(samples=rows), show_progress=False, plan=planner)
    assert report.initialized == report.targeted
    return report, report.forecast["device"] - used


@MEMORY
@pytest.mark.parametrize("segments", [1, 6], ids=["one pass", "streamed"])
def test_no_more_memory_is_taken_than_was_forecast(segments: int) -> None:
    estimated(wide(), rows=2)  # libraries take theirs
    on = wide()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    report, _ = estimated(on, segments)
    assert torch.cuda.max_memory_allocated(DEVICE) <= report.forecast["device"] + WORKSPACE


@MEMORY
def test_a_cap_changes_how_the_model_is_run_and_not_what_comes_out() -> None:
    """Half of what one pass takes: whether that is planned for or found out, the start is the same."""
    whole = wide(torch.float32)
    _, needed = estimated(whole, 1)
    expected = {name: tensor.double().cpu() for name, tensor in adapter_weights(whole).items()}
    del whole
    on = wide(torch.float32)
    with capped(needed // 2 + WORKSPACE):
        estimated(on)
    assert farthest({name: tensor.double().cpu() for name, tensor in adapter_weights(on).items()}, expected) <= TURNED
