"""Axolotl's fused LoRA kernels hide projections from hooks; inside `lifted_lora_kernels` they are modules again."""

from __future__ import annotations

from collections import Counter
from types import MethodType

import pytest
import torch
from models import PROJECTIONS, tiny_llama, with_lora
from torch import nn

pytest.importorskip("axolotl", reason="Axolotl is not installed")
pytestmark = [pytest.mark.axolotl, pytest.mark.filterwarnings("default")]  # Axolotl's imports warn of much

from axolotl.monkeypatch import lora_kernels
from axolotl.utils.dict import DictDefault
from peft.tuners.lora import LoraLayer
from transformers.models.llama.modeling_llama import LlamaAttention

from axolotl_lora_da.kernels import lifted_lora_kernels

KERNELS = ["lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel", "lora_embedding_kernel"]
IDS = torch.arange(12).reshape(2, 6)


def adapted_llama() -> nn.Module:
    base = tiny_llama(architectures=["LlamaForCausalLM"])
    return with_lora(base, r=2, target_modules=[*PROJECTIONS, "embed_tokens"], init_lora_weights=False)


@pytest.fixture
def fused(tmp_path):
    """Builds a model with kernels on, as Axolotl does: it rewrites the attention class, then binds to each module."""
    forward = LlamaAttention.forward

    def build(*kernels: str) -> nn.Module:
        model = adapted_llama()
        model.config.save_pretrained(tmp_path)
        cfg = DictDefault({"base_model": str(tmp_path), **dict.fromkeys(kernels, True)})
        lora_kernels.patch_self_attn_lora(cfg)
        return lora_kernels.apply_lora_kernel_patches(model, cfg)

    yield build
    LlamaAttention.forward = forward
    if hasattr(LlamaAttention, "_original_forward"):
        del LlamaAttention._original_forward


def bound(model: nn.Module) -> dict[tuple[str, str], object]:
    """Every method bound to a single module, by that module and its name there."""
    return {
        (path, name): method
        for path, module in model.named_modules()
        for name, method in vars(module).items()
        if isinstance(method, MethodType)
    }


def fired(model: nn.Module) -> Counter:
    """How often each LoRA layer is called as a module in one forward."""
    counts: Counter = Counter()
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    hooks = [
        module.register_forward_hook(lambda *_, path=path: counts.update([path.rsplit(".", 1)[-1]]))
        for path, module in layers
    ]
    try:
        model(IDS)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


@pytest.mark.compat("axolotl-kernels")
def test_hooks_fire_once_for_every_lora_layer_and_the_kernels_come_back(fused):
    model = fused(*KERNELS)
    before = bound(model)
    names = Counter(name for _, name in before if name == "forward" or name.startswith("apply_"))
    assert names == {"apply_qkv": 2, "apply_o": 2, "forward": 3}, "two layers, and the embedding's forward"
    with lifted_lora_kernels(model):
        assert fired(model) == {**dict.fromkeys(PROJECTIONS, 2), "embed_tokens": 1}
    after = bound(model)
    assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)


def test_without_lifting_the_hooks_of_fused_projections_are_silent(fused):
    """The negative control, on the kernels that run without Triton."""
    model = fused("lora_qkv_kernel", "lora_o_kernel")
    silent = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not silent & fired(model).keys()
    with lifted_lora_kernels(model):
        assert silent <= fired(model).keys()
    assert not silent & fired(model).keys()


def test_the_lifted_model_computes_what_the_unpatched_one_does(fused):
    plain = adapted_llama()
    expected = plain(IDS, labels=IDS)
    expected.loss.backward()
    model = fused(*KERNELS)  # afterwards: the rewriting is of the class
    with lifted_lora_kernels(model):
        seen = model(IDS, labels=IDS)
        seen.loss.backward()
    assert torch.equal(seen.logits, expected.logits)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if ours.requires_grad:
            assert torch.equal(ours.grad, theirs.grad), name


def test_an_exception_puts_them_back_too(fused):
    model = fused(*KERNELS)
    before = bound(model)
    with pytest.raises(KeyboardInterrupt), lifted_lora_kernels(model):
        raise KeyboardInterrupt
    assert all(bound(model)[key] is before[key] for key in before)


def test_a_failure_halfway_through_lifting_puts_them_back_too(fused, monkeypatch):
    model = fused(*KERNELS)
    before = bound(model)
    monkeypatch.delattr(lora_kernels, "original_apply_o")
    with pytest.raises(AttributeError), lifted_lora_kernels(model):
        pass
    assert all(bound(model)[key] is before[key] for key in before)


def test_unfused_attention_stays_callable(fused):
    """Where there is one kernel only, Axolotl binds its own plain functions to the rewritten forward's other slots."""
    model = fused("lora_o_kernel")
    with lifted_lora_kernels(model):
        assert fired(model)["q_proj"] == fired(model)["o_proj"] == 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(3, 3), nn.Linear(3, 3), None


def test_keys_shared_with_values():
    """Gemma 4's layers without a v_proj."""
    attention = Attention()
    attention.apply_qkv = MethodType(lora_kernels.apply_lora_qk, attention)
    x = torch.ones(1, 3)
    with lifted_lora_kernels(attention):
        _, keys, values = attention.apply_qkv(x)
    assert keys is values and torch.equal(keys, attention.k_proj(x))


def test_linear_attention_falls_back_to_its_modules():
    """Its forward asks with getattr whether the slots are there, so that they must be gone and not replaced."""
    mixer = nn.Linear(3, 3)
    mixer.apply_out_proj = MethodType(lora_kernels._make_apply_lora_linear("out_proj"), mixer)
    mixer.apply_in_proj_fused = MethodType(lora_kernels._make_apply_lora_gdn_in_proj(("in_proj_z",)), mixer)
    before = bound(mixer)
    with lifted_lora_kernels(mixer):
        assert not hasattr(mixer, "apply_out_proj") and not hasattr(mixer, "apply_in_proj_fused")
    assert all(bound(mixer)[key] is before[key] for key in before)


def test_methods_of_others_are_left_alone():
    model = nn.Linear(3, 3)
    model.forward = MethodType(lambda self, x: x, model)
    model.apply_mask = MethodType(lambda self, x: x, model)
    before = bound(model)
    with lifted_lora_kernels(model):
        assert all(bound(model)[key] is before[key] for key in before)


def test_a_model_without_kernels_is_left_alone():
    model = nn.Linear(3, 3)
    with lifted_lora_kernels(model):
        assert bound(model) == {}
