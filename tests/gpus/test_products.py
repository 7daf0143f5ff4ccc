"""Products of 16 bit with float32 sums, on GPUs that can make them and GPUs that cannot."""

from __future__ import annotations

import pytest
import torch
from collecting import distance, needs
from fake_cuda import fake_gpus
from on_gpus import BLOCKS, GPU, check_same, dense, initialised
from tolerances import REORDERED

from lora_da import products
from lora_da.needs import Sums
from lora_da.products import SYMMETRIC_FROM, adds_float32, product_itemsize, returns_float32
from lora_da.statistics import InputSums, LayerSums


@pytest.fixture
def unasked():
    """Nobody has asked the GPUs yet what they can do, nor knows it afterwards."""
    for ask in (returns_float32, adds_float32):
        ask.cache_clear()
    yield
    for ask in (returns_float32, adds_float32):
        ask.cache_clear()


# What GPUs can do with products of 16 bit, and how many they are asked for then: ROCm's and old CUDA's refuse a float32
# result and are asked once; those that cannot add one to a sum in its memory are asked once for that.
CAN = {"widen and add": (True, True), "widen": (True, False), "neither": (False, False)}


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("can", CAN)
def test_products_of_16_bit(can: str) -> None:
    expected = initialised(dense(torch.bfloat16), first_step="gamma")
    with fake_gpus() as gpus:
        gpus.widens, gpus.adds_widened = CAN[can]
        found = initialised(dense(torch.bfloat16).to("cuda"), first_step="gamma")
    check_same(found, expected, REORDERED)
    assert gpus.wide_products > 2 * 7 * BLOCKS if gpus.widens else gpus.wide_products == 1


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("adds_widened", [True, False])
@pytest.mark.parametrize("i", [SYMMETRIC_FROM - 8, SYMMETRIC_FROM])
def test_a_product_is_added_where_its_sum_is(adds_widened: bool, i: int) -> None:
    """Beside the sums nothing as large as one of them is made, in block rows or not; else the largest product is."""
    g, o = torch.Generator().manual_seed(0), 320
    x, d = (torch.randn(16, k, generator=g).bfloat16() for k in (i, o))
    with fake_gpus() as gpus:
        gpus.adds_widened = adds_widened
        assert product_itemsize(torch.device(GPU), torch.bfloat16) == 4 * (not adds_widened)
        assert product_itemsize(torch.device(GPU), torch.float32) == 0
        sums = LayerSums(InputSums(Sums()), needs(full=True))
        rows = x.to(GPU), d.to(GPU)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats(GPU)
            before = gpus.live.total()
            sums.inputs.add(rows[0])
            sums.add(*rows)
        beside = gpus.peak.total() - before
        means = sums.take_means(1.0, 1.0).to(torch.device("cpu"))
    assert beside == (0 if adds_widened else 4 * max(i * i // (4 if i >= SYMMETRIC_FROM else 1), i * o))
    wide_x, wide_d = x.double(), d.double()
    truth = 2 * wide_d.T @ wide_x, wide_x.T @ wide_x / 16, wide_d.T @ wide_d / 16
    for found, expected in zip((means.grad, means.input_cov, means.output_fisher), truth, strict=True):
        assert distance(found, expected) <= REORDERED


@pytest.mark.usefixtures("unasked")
def test_an_addition_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device answers is looked at: one that forgets what was there adds nothing."""
    right = products._add_widened
    monkeypatch.setattr(products, "_add_widened", lambda sum_, a, b: right(sum_.zero_(), a, b))
    with fake_gpus():
        assert not adds_float32(torch.device(GPU), torch.bfloat16)


@pytest.mark.usefixtures("unasked")
def test_a_full_gpu_does_not_count_as_one_that_refuses() -> None:
    with fake_gpus(memory=2**20):
        held = torch.zeros(2**20, dtype=torch.uint8, device="cuda")
        for ask in (returns_float32, adds_float32):
            with pytest.raises(torch.OutOfMemoryError):
                ask(held.device, torch.bfloat16)
        del held
        assert returns_float32(torch.device(GPU), torch.bfloat16) and adds_float32(torch.device(GPU), torch.bfloat16)
