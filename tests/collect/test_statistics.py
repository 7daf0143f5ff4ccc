"""Running sums: the plain products, also where a wide symmetric one is made of block rows."""

import pytest
import torch
from collecting import needs

from lora_da.needs import Sums
from lora_da.products import SYMMETRIC_FROM
from lora_da.statistics import InputSums, LayerSums

pytestmark = pytest.mark.once

SUMMED = 1e-12  # float64 sums in another order


@pytest.mark.parametrize("i", [3, SYMMETRIC_FROM - 1, SYMMETRIC_FROM, SYMMETRIC_FROM + 3])
@pytest.mark.parametrize("full_fisher", [False, True])
def test_means_are_those_of_all_tokens(i: int, full_fisher: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, d = (torch.randn(50, k, generator=g, dtype=torch.float64) for k in (i, 7))
    inputs = InputSums(Sums())
    layer = LayerSums(inputs, needs(full=full_fisher))
    for part in (slice(0, 20), slice(20, 50)):
        inputs.add(x[part])
        layer.add(x[part], d[part])
    means = layer.take_means(10, scale=4.0)
    fisher = d.T @ d / 16 / 50
    truth = (d.T @ x / 40, x.T @ x / 50, fisher if full_fisher else fisher.diagonal())
    for ours, expected in zip((means.grad, means.input_cov, means.output_fisher), truth, strict=True):
        assert torch.linalg.norm(ours - expected) <= SUMMED * torch.linalg.norm(expected)
    assert means.n_tokens == 50


def test_sums_of_nothing_have_no_mean() -> None:
    inputs = InputSums(Sums())
    assert inputs.take_mean() is None and LayerSums(inputs, needs()).take_means(1, 1.0) is None
