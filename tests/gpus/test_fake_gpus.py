"""The GPUs that are not there: what they forgive and what they do not, what they count, and that nothing stays."""

from __future__ import annotations

import gc

import pytest
import torch
from fake_cuda import fake_gpus
from fake_gpu import FakeGpus, MixedDevices
from torch import nn

pytestmark = pytest.mark.once

GPU = torch.device("cuda:0")


@pytest.fixture
def gpus():
    with fake_gpus(2, memory=2**20) as found:
        yield found


def waits(gpus: FakeGpus) -> list[str]:
    """What the host has waited for, in this file."""
    return sorted(wait.what for wait in gpus.waits.elements() if wait.line.startswith("tests/gpus/test_fake_gpus.py:"))


def test_what_is_made_of_a_tensor_is_where_it_is(gpus: FakeGpus) -> None:
    x = torch.randn(3, 4, device="cuda:1")
    made = [x + 1, x.T, x[1:], x @ x.T, torch.zeros_like(x), x.new_ones(2), x.new_tensor([1.0]), x.to(torch.float64)]
    made += [torch.nn.functional.softmax(x, 1), x.detach(), nn.Parameter(x), torch.arange(3, device=x.device)]
    assert {tensor.device for tensor in made} == {torch.device("cuda:1")}
    assert torch.tensor([1, 2], device="cuda").device == x.to("cuda").device == GPU
    assert x.cpu().device == x.to("cpu").device == torch.ones(2).device == torch.device("cpu")
    assert x.to(x.device) is x and x.is_cuda and not x.cpu().is_cuda and x.get_device() == 1


def test_numbers_and_gradients_are_the_cpus(gpus: FakeGpus) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    layer(x).square().sum().backward()
    expected = x.grad.clone(), layer.weight.grad.clone()
    x.grad = layer.weight.grad = None
    layer.to("cuda:1")(x.to(GPU).bfloat16().float().to("cuda:1") * 0 + x.to("cuda:1")).square().sum().backward()
    assert (x.grad.device, layer.weight.grad.device) == (torch.device("cpu"), torch.device("cuda:1"))
    assert torch.equal(x.grad, expected[0]) and torch.equal(layer.weight.grad.cpu(), expected[1])


MIXES = {
    "a product": lambda a, b: a @ b.T,
    "a sum": lambda a, b: a + b,
    "a sum in place": lambda a, b: b.add_(a),
    "rows by an index on the other": lambda a, b: b[a[0].long()],
    "joined": lambda a, b: torch.cat([a, b]),
    "a number of the GPU's in one of the CPU's": lambda a, b: torch.zeros(()).add_(a.sum()),
}


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_devices_are_refused_with_their_line(gpus: FakeGpus, mix: str, other: str) -> None:
    a, b = torch.zeros(2, 3, device=GPU), torch.zeros(2, 3, device=other)
    with pytest.raises(MixedDevices, match=rf" at tests/gpus/test_fake_gpus\.py:\d+ of tensors .* on {GPU}"):
        MIXES[mix](a, b)


def test_what_a_gpu_allows_is_allowed(gpus: FakeGpus) -> None:
    x = torch.ones(3, device=GPU)
    x += torch.tensor(2.0)  # a single number of the CPU's
    x[torch.tensor([0, 1])] = 5.0
    torch.empty(3).copy_(x)
    assert x.tolist() == [5, 5, 3]


def test_waits_are_counted_by_line(gpus: FakeGpus) -> None:
    x, asked = torch.randn(4, 4, device=GPU), torch.tensor([1])
    gpus.waits.clear()
    x.sum().item()
    assert x.any()
    x[x > 0]
    x[asked]
    x.nonzero()
    x.tolist()
    x.cpu()
    torch.linalg.eigh(x)
    torch.cuda.synchronize()
    x.copy_(torch.zeros(4, 4))
    expected = ["_linalg_eigh", "_local_scalar_dense", "_local_scalar_dense", "copy", "copy of indices", "copy to cpu"]
    assert waits(gpus) == [*expected, "mask", "nonzero", "synchronize", "tolist"]
    assert len({wait.line for wait in gpus.waits}) == 10 and all(wait.ours for wait in gpus.waits)


def test_what_does_not_wait(gpus: FakeGpus) -> None:
    x = torch.randn(4, 4, device=GPU)
    gpus.waits.clear()
    x.to("cpu", non_blocking=True), torch.ones(3).to(GPU, non_blocking=True), x.to("cuda:1")
    x @ x + 1, x.float().bfloat16(), torch.linalg.qr(x), torch.linalg.cholesky_ex(x @ x.T)
    x[torch.arange(2, device=GPU)], torch.ones(3).sum().item()
    assert not gpus.waits


def test_memory_is_counted_and_runs_out(gpus: FakeGpus) -> None:
    x = torch.zeros(1024, device=GPU)
    view, other = x[1:], x + 1
    assert torch.cuda.memory_allocated(GPU) == 8192 and torch.cuda.memory_allocated(1) == 0
    del x, other
    gc.collect()
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (4096, 8192)
    assert torch.cuda.mem_get_info() == (2**20 - 4096, 2**20)
    with pytest.raises(torch.OutOfMemoryError):
        view.new_zeros(2**18)
    torch.cuda.reset_peak_memory_stats()
    del view
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (0, 4096)


def test_nothing_stays() -> None:
    before = dict(vars(torch.cuda)), dict(vars(torch.Tensor)), torch.tensor
    with fake_gpus(), pytest.raises(RuntimeError, match="invalid device ordinal"):
        x = torch.ones(2, device="cuda")
        torch.ones(2, device="cuda:1")
    assert (vars(torch.cuda), dict(vars(torch.Tensor)), torch.tensor) == before
    assert x.device == torch.device("cpu") and not torch.cuda.is_available()
