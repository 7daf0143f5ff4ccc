"""Solving inside a training run: whatever precision the host has set, and where memory runs out."""

import pytest
import torch
from models import batches, documents, pad, tiny_llama, with_lora
from settings import as_solved

import lora_da.methods.lora_da
from lora_da import LoraDAError, initialize_lora_da_weights
from lora_da.adapter import find_adapter

pytestmark = pytest.mark.once


def initialised(model) -> dict[str, torch.Tensor]:
    initialize_lora_da_weights(model, batches(documents(8), 4), as_solved(samples=8), show_progress=False)
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}


def test_a_trainers_tf32_and_autocast_end_at_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.fp32_precision, []
    original = lora_da.methods.lora_da.lora_da

    def spy(*args, **kwargs):
        seen.append((matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return original(*args, **kwargs)

    monkeypatch.setattr(lora_da.methods.lora_da, "lora_da", spy)
    try:
        matmul.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16):
            initialised(with_lora(tiny_llama()))
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert seen and set(seen) == {("ieee", False)}


def test_a_layer_that_does_not_fit_in_the_cpus_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(lora_da.methods.lora_da, "lora_da", full)
    with pytest.raises(LoraDAError, match=r"layer .*q_proj does not fit in the CPU's memory"):
        initialised(with_lora(tiny_llama()))


def test_other_errors_of_the_solver_are_not_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(lora_da.methods.lora_da, "lora_da", broken)
    with pytest.raises(RuntimeError, match="something else"):
        initialised(with_lora(tiny_llama()))


def test_each_layer_has_random_rows_of_its_own() -> None:
    """The rows that are not solved for: of plain LoRA's variance, the same whatever the seed, with no lora_B."""
    starts = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = with_lora(tiny_llama(), r=8)
        config = as_solved(samples=8, population_size=100)
        initialize_lora_da_weights(model, [pad(documents((9, 14, 6, 11, 13, 8, 12, 10)))], config, show_progress=False)
        starts.append({layer.name: layer.factors() for layer in find_adapter(model).layers})
    assert not any(lora_B[:, 4:].any() for _, lora_B in starts[0].values())
    assert all(lora_B[:, :4].any() for _, lora_B in starts[0].values())
    rows = {name: lora_A[4:] for name, (lora_A, _) in starts[0].items()}
    assert all(torch.equal(rows[name], lora_A[4:]) for name, (lora_A, _) in starts[1].items())
    assert len({tuple(drawn.flatten().tolist()) for drawn in rows.values()}) == len(rows)
    for layer in find_adapter(model).layers:
        spread = rows[layer.name].std().item()  # of 128 numbers or more: off by 6 %
        assert spread == pytest.approx(layer.plain_variance**0.5, rel=0.3)
