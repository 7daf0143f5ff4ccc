"""A twin is what nf4 weights dequantise to, and no trainer takes it for a quantised model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from models import WIDE, tiny_llama
from peft.utils.integrations import dequantize_bnb_weight

from benchmarks.qlora import dense_linear, load_model, lora_config, nf4_linear

pytestmark = pytest.mark.once

CPU = torch.device("cpu")
ROUNDING = 2**-7  # of a bf16 product, relative to the largest of its kind


def test_a_twin_has_the_weights_that_nf4_dequantises_to(tmp_path):
    tiny_llama(**WIDE).save_pretrained(tmp_path)
    nf4, twin, bf16 = (load_model(tmp_path, base, CPU) for base in ("nf4", "twin", "bf16"))
    expected = {
        name: dequantize_bnb_weight(p) if type(p).__name__ == "Params4bit" else p for name, p in nf4.named_parameters()
    }
    found = dict(twin.named_parameters())
    assert found.keys() == expected.keys()
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, expected[name]) for name, p in found.items())
    assert not torch.equal(twin.model.layers[0].mlp.up_proj.weight, bf16.model.layers[0].mlp.up_proj.weight)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits, of_nf4 = (model(input_ids=ids).logits.float() for model in (twin, nf4))
    assert (logits - of_nf4).abs().max() <= 4 * ROUNDING * of_nf4.abs().max()  # after some layers


def test_nobody_takes_a_twin_for_a_quantised_model(tmp_path):
    tiny_llama(**WIDE).save_pretrained(tmp_path)
    nf4, twin = (load_model(tmp_path, base, CPU) for base in ("nf4", "twin"))
    for model, quantised in ((nf4, True), (twin, False)):
        assert model.is_loaded_in_4bit is model.is_quantized is quantised
        assert hasattr(model.config, "quantization_config") is quantised


def test_a_dense_layer_computes_what_its_quantised_one_does():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))  # (o, i)
    bias = torch.nn.Parameter(torch.arange(64.0))
    quantised, dense = (build(weight, bias, CPU) for build in (nf4_linear, dense_linear))
    x = torch.eye(128)
    assert torch.allclose(dense(x), quantised(x), atol=1e-5)
    assert not torch.allclose(dense(x) - bias, weight.T, atol=1e-2)
    assert not dense.weight.requires_grad


def test_alpha_is_so_many_times_the_rank():
    assert (lora_config(8).lora_alpha, lora_config(8, 0.5).lora_alpha) == (16, 4)
