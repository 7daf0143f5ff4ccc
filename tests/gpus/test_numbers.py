"""GPUs that are not there make the CPU's adapters, with no tensor left on another device."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from dequantized import four_bit
from fake_cuda import fake_gpus
from fake_gpu import MixedDevices
from models import WIDE, adapter_weights, documents, pad, tiny_llama, with_lora
from on_gpus import Made, check_on_a_gpu, check_same, dense, initialised
from peft import PeftModel
from planning import WAYS
from settings import as_solved
from stacks import stacked, with_experts
from tolerances import REBATCHED, REORDERED
from torch.utils.data import DataLoader

from lora_da import initialize_lora_da_weights
from lora_da.collect.plan import Plan, make_plan
from lora_da.memory import GIB
from lora_da.statistics import LayerSums

# Of 16-bit products the GPU adds up in float32 what the CPU multiplies in float32: rounding in another order.
HALF = {torch.bfloat16, torch.float16}


@pytest.mark.parametrize("way", WAYS)
def test_every_plan(way: str) -> None:
    check_on_a_gpu(dense, way=WAYS[way], first_step="gamma")


@pytest.mark.parametrize("way", ["one pass", "2 segments in 3 parts"])
def test_experts_in_one_parameter(way: str) -> None:
    check_on_a_gpu(lambda: with_experts(stacked("GptOss")), way=WAYS[way])


@pytest.mark.parametrize("preset", ["default", "reference", "paper"])
def test_every_preset(preset: str) -> None:
    """The first step is measured where the preset says so."""
    check_on_a_gpu(dense, preset=preset)


@pytest.mark.parametrize("method", ["filet", "cntlora", "lora_one", "lora_ga"])
def test_every_method(method: str) -> None:
    check_on_a_gpu(dense, method=method)


def test_the_full_fisher_of_wide_layers() -> None:
    """Wide enough that eigenpairs are iterated on and inputs summed block by block."""
    check_on_a_gpu(
        lambda: dense(hidden_size=528, intermediate_size=160, head_dim=24), full_fisher_up_to=200, first_step="gamma"
    )


@pytest.mark.parametrize("way", ["one pass", "2 segments"])
@pytest.mark.parametrize("dtype", sorted(HALF, key=str), ids=str)
def test_half_precision(dtype: torch.dtype, way: str) -> None:
    """Under the host's products of 16 bit with float32 sums."""
    check_on_a_gpu(lambda: dense(dtype), REORDERED, way=WAYS[way], first_step="gamma")


@pytest.mark.parametrize("method", ["lora_da", "filet"])
def test_four_bit(tmp_path: Path, method: str) -> None:
    """bitsandbytes's own kernels run, those for the CPU; `filet` has the weights dequantised.

    A GPU squares d of 16 bit as it reads it, and rounds otherwise than the CPU; the solver makes more of that.
    """
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = four_bit(tiny_llama(num_hidden_layers=2, **WIDE), tmp_path, "double-quantisation", torch.bfloat16)
    check_on_a_gpu(lambda: with_lora(copy.deepcopy(base)), REBATCHED, method=method, way=WAYS["2 segments"])


def test_a_second_run_takes_the_firsts_solution(tmp_path: Path) -> None:
    with fake_gpus():
        first, second = (initialised(dense().to("cuda"), cache_dir=str(tmp_path)) for _ in "ab")
    check_same(second, first)
    assert second[1].from_cache and not first[1].from_cache
    check_same(initialised(dense(), cache_dir=str(tmp_path / "other")), first)


def test_a_card_that_is_too_small_for_one_pass() -> None:
    """The product plans by what the card says it has; the fake raises where that is passed."""
    expected = initialised(dense(), first_step="gamma")
    with fake_gpus() as gpus:
        one = initialised(dense().to("cuda"), None, first_step="gamma")
    assert one[1].plan.startswith("one pass")
    with fake_gpus(memory=int(1.2 * gpus.peak.total())):  # the forecast is above the peak, and leaves a margin
        several = initialised(dense().to("cuda"), None, first_step="gamma")
    assert several[1].plan.startswith("streamed")
    check_same(several, expected, REBATCHED)


def test_large_batches_where_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    """Batches of 8,192 tokens, chunks of 2,048, while that leaves the plan as cheap as small ones do; results change
    by rounding, and no more is taken than was forecast. On the CPU all is as it was."""
    rows, sizes = documents([64] * 160), {"num_hidden_layers": 2, "vocab_size": 1024}
    plans: list[Plan] = []
    base = tiny_llama(**sizes)

    def started(model: PeftModel, budget: float | None = None) -> Made:
        config = as_solved(samples=160, memory_budget=budget)
        loader, planner = DataLoader(rows, 4, collate_fn=pad), lambda *args: plans.append(make_plan(*args)) or plans[-1]
        report = initialize_lora_da_weights(model, loader, config, show_progress=False, plan=planner)
        return {name: value.cpu() for name, value in adapter_weights(model).items()}, report

    expected = started(with_lora(copy.deepcopy(base)))
    assert (plans[-1].batch_tokens, plans[-1].chunk) == (2048, 256)
    sizes_planned = []
    for share in (None, 0.999, 0.5, 0.3):
        with fake_gpus() as gpus:
            model = with_lora(copy.deepcopy(base)).to("cuda")
            before, budget = gpus.live.total(), None if share is None else share * plans[1].device_bytes / GIB
            found = started(model, budget)
        check_same(found, expected, REBATCHED)
        sizes_planned.append((plans[-1].batch_tokens, plans[-1].chunk))
        assert plans[-1].line().startswith("one pass")
        assert gpus.peak.total() - before <= plans[-1].device_bytes <= plans[-1].budget
    assert sizes_planned[:2] == [(8192, 2048), (8192, 1024)]
    assert [tokens for tokens, _ in sizes_planned[2:]] == [4096, 2048]
    assert "out of memory" not in caplog.text


def test_a_tensor_left_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add = LayerSums.add
    monkeypatch.setattr(LayerSums, "add", lambda sums, x, d: add(sums, x.cpu(), d))
    with fake_gpus(), pytest.raises(MixedDevices, match=r"aten\.addmm_\.default at lora_da/products\.py:\d+ of "):
        initialised(dense().to("cuda"))
