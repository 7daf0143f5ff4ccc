"""Quantised bases beyond bitsandbytes: what PEFT wraps and gradients pass through gives its dense twin's statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from collecting import collected, worst
from models import LENGTHS, PREFIX, PROJECTIONS, WIDE, documents, pad, tiny_llama, with_lora
from peft import PeftModel
from planning import surveyed_model
from settings import as_solved
from tolerances import DEQUANTISED
from torch import nn

from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.adapter import find_adapter

pytestmark = pytest.mark.filterwarnings("default")  # these packages warn of much

GROUP = 32
BATCHES = [pad(documents(LENGTHS))]
DEQUANTISED_FLOAT16 = 5e-3  # AWQ's layer multiplies in float16, eps 1e-3


def original() -> nn.Module:
    return tiny_llama(**WIDE)


def each_linear(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with every projection in another format."""
    model = original()
    for name, module in [*model.model.named_modules()]:
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, make(module))
    return model


def hqq(bits: int) -> nn.Module:
    pytest.importorskip("hqq", reason="HQQ is not installed")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
    return each_linear(lambda layer: HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"))


def torchao(config: str, *args: object) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = original()
    quantization.quantize_(model.model, getattr(quantization, config)(*args))
    return model


def groups_of(layer: nn.Linear, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, (o, i / GROUP), of an asymmetric quantisation by rounding."""
    groups = layer.weight.detach().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / (2**bits - 1)
    return scales, (-low / scales).round()


def gptq(bits: int) -> nn.Module:
    kernel = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed")

    def make(layer: nn.Linear) -> nn.Module:
        quantized = kernel.TorchLinear(bits, GROUP, False, False, layer.in_features, layer.out_features, False)
        quantized.pack_original(layer, *groups_of(layer, bits), torch.arange(layer.in_features) // GROUP)
        quantized.optimized = True  # no compiler: these layers run a few times
        quantized.post_init()
        return quantized

    return each_linear(make)


def awq() -> nn.Module:
    kernel = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq", reason="gptqmodel is not installed")

    def make(layer: nn.Linear) -> nn.Module:
        quantized = kernel.AwqTorchLinear(4, GROUP, False, False, layer.in_features, layer.out_features, False)
        quantized.pack(layer, *groups_of(layer, 4))
        quantized.post_init()
        return quantized

    return each_linear(make)


FORMATS = {
    "HQQ, 8 bits": (lambda: hqq(8), DEQUANTISED),
    "HQQ, 4 bits": (lambda: hqq(4), DEQUANTISED),
    "HQQ, 3 bits": (lambda: hqq(3), DEQUANTISED),
    "HQQ, 2 bits": (lambda: hqq(2), DEQUANTISED),
    "torchao, int8": (lambda: torchao("Int8WeightOnlyConfig"), DEQUANTISED),
    "torchao, float8": (lambda: torchao("Float8WeightOnlyConfig"), DEQUANTISED),
    "torchao, 4 bits": (lambda: torchao("IntxWeightOnlyConfig", torch.int4), DEQUANTISED),
    "GPTQ, 8 bits": (lambda: gptq(8), DEQUANTISED),
    "GPTQ, 4 bits": (lambda: gptq(4), DEQUANTISED),
    "AWQ, 4 bits": (awq, DEQUANTISED_FLOAT16),
}
DEQUANTISED_BY_PEFT = [kind for kind in FORMATS if kind.startswith(("HQQ", "torchao"))]


def adapted(model: nn.Module, **config: object) -> PeftModel:
    return with_lora(model, **{"target_modules": PROJECTIONS, **config})


@torch.no_grad()
def dense(layer: nn.Module) -> torch.Tensor:
    """W, (o, i), of any format: what the layer makes of unit vectors."""
    return layer(torch.eye(layer.in_features)).T


def twin(model: nn.Module) -> nn.Module:
    found = original()
    for name, module in found.model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data.copy_(dense(model.model.get_submodule(name)))
    return found


@pytest.mark.compat("hqq", "torchao-int8", "torchao-float8", "torchao-int4")
@pytest.mark.parametrize("kind", FORMATS)
def test_statistics_are_those_of_the_dequantised_twin(kind: str) -> None:
    build, same = FORMATS[kind]
    model = build()
    expected = collected(adapted(twin(model)), BATCHES)
    assert worst(collected(adapted(model), BATCHES), expected) <= same
    assert worst(collected(adapted(original()), BATCHES), expected) > 100 * DEQUANTISED  # the twin was needed


@pytest.mark.compat("hqq", "torchao-int8", "torchao-float8", "torchao-int4")
@pytest.mark.parametrize("kind", FORMATS)
def test_an_adapter_is_initialised(kind: str) -> None:
    """All layers; the model's function is the same with the adapter off, and another with it on."""
    model = adapted(FORMATS[kind][0]())
    ids = BATCHES[0]["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        before = model(ids).logits
    report = initialize_lora_da_weights(model, BATCHES, as_solved(samples=4), show_progress=False)
    assert report.initialized == report.targeted == 14 and not report.left
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, before)
        assert not torch.equal(model(ids).logits, before)
    steps = [layer.relative_step for layer in report.layers.values()]
    assert all((step is not None and 0 < step < 1) == (kind in DEQUANTISED_BY_PEFT) for step in steps)


@pytest.mark.compat("dora")
@pytest.mark.parametrize("kind", DEQUANTISED_BY_PEFT)
def test_dora_starts_with_the_norms_of_the_start(kind: str) -> None:
    base = FORMATS[kind][0]()
    weights = dict(twin(base).named_parameters())
    model = adapted(base, use_dora=True)
    initialize_lora_da_weights(model, BATCHES, LoraDAConfig(samples=4, gamma=4.0), show_progress=False)
    for layer in find_adapter(model).layers:
        step = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        expected = (weights[layer.name.removeprefix(PREFIX) + ".weight"].double() + step).norm(dim=1)
        assert (layer.magnitude - expected).abs().max() <= 1e-5 * expected.max()


class Cut(nn.Linear):
    """A layer for inference."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class Unfinished(nn.Linear):
    """A kernel whose backward nobody wrote."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NoBackward.apply(super().forward(x))


def without_backward(kind: type[nn.Linear]) -> nn.Module:
    def make(layer: nn.Linear) -> nn.Module:
        made = kind(layer.in_features, layer.out_features, bias=False)
        made.load_state_dict(layer.state_dict())
        return made.requires_grad_(False)

    return each_linear(make)


BLOCKED = {
    "torchao, int8 activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "cut": lambda: without_backward(Cut),
    "no backward": lambda: without_backward(Unfinished),
}


@pytest.mark.refused("torchao-int8-activations", "no-backward")
@pytest.mark.parametrize("targets", [PROJECTIONS, ["down_proj"]], ids=["all", "down_proj"])
@pytest.mark.parametrize("kind", BLOCKED)
def test_a_layer_that_passes_no_gradient_is_named(kind: str, targets: list[str]) -> None:
    """Also where gradients reach the targeted layer past the others, along the residual stream, and are wrong."""
    model = adapted(BLOCKED[kind](), target_modules=targets)
    with pytest.raises(LoraDAError, match=r"no gradient passes through layer .*layers\.\d.*_proj.*has a backward"):
        initialize_lora_da_weights(model, BATCHES, as_solved(samples=4), show_progress=False)


def test_a_layer_keeps_the_tensors_of_the_mode_it_was_in() -> None:
    """Some formats hold other tensors in train mode; `train` moves them, a flag alone would not."""

    class TwoModes(nn.Linear):
        held = "evaluation"

        def train(self, mode: bool = True):
            if mode != self.training:
                self.held = "training" if mode else "evaluation"
            return super().train(mode)

    model = adapted(without_backward(TwoModes)).eval()
    layers = [layer.base for layer in find_adapter(model).layers]
    layers[0].train()
    before = [(layer.held, layer.training) for layer in layers]
    assert len(set(before)) == 2
    initialize_lora_da_weights(model, BATCHES, as_solved(samples=4), show_progress=False)
    assert [(layer.held, layer.training) for layer in layers] == before


class PlainAutograd(nn.Module):
    """Dequantises and multiplies, and so keeps its dense weight for the backward, as GPTQ's and AWQ's layers do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("packed", layer.weight.detach().half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed.to(x.dtype).T


def test_dense_weights_that_the_backward_keeps_are_planned_with() -> None:
    """What autograd saves in one block, counted as it is saved."""
    quantized = each_linear(PlainAutograd)
    models = [with_lora(model, target_modules=["lm_head"]) for model in (original(), quantized)]
    surveys = [surveyed_model(model, BATCHES) for model in models]
    assert surveys[0].linear_features == surveys[1].linear_features
    assert surveys[0].kept_weights == (0, 0)
    saved: list[int] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.nbytes)
        return t

    for module in quantized.model.layers[0].modules():
        if isinstance(module, PlainAutograd):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                module(torch.randn(1, module.in_features, requires_grad=True))
    assert surveys[1].kept_weights == (sum(saved), sum(saved))
