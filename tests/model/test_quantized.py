"""A quantised base gives the statistics of its dequantised twin, and keeps every bit of its own."""

import copy

import pytest
import torch
from collecting import collected, distance, watching, worst
from dequantized import FOUR_BIT, dequantized, four_bit
from models import LENGTHS, PREFIX, WIDE, documents, packed, pad, quantized, tiny_llama, with_lora
from peft import PeftModel
from settings import as_solved
from tolerances import DEQUANTISED
from torch import nn
from transformers import PreTrainedModel

from lora_da import initialize_lora_da_weights
from lora_da.adapter import find_adapter

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def original() -> PreTrainedModel:
    """Wide enough for bitsandbytes' blocks of 64."""
    return tiny_llama(**WIDE)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    return dequantized(model, original())


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


@pytest.mark.compat("nf4", "fp4", "double-quantisation", "quant-storage")
@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize("layout", [lambda rows: [pad(rows)], lambda rows: [packed(rows)]], ids=["padded", "packed"])
def test_four_bit_equals_its_dequantised_twin(tmp_path, kind: str, layout) -> None:
    base, batches = four_bit(original(), tmp_path, kind), layout(documents(LENGTHS))
    dense = collected(with_lora(twin(base)), batches)
    ours = collected(with_lora(base), batches)
    assert worst(ours, dense) <= DEQUANTISED
    unquantised = collected(with_lora(original()), batches)
    assert worst(ours, unquantised) > 100 * DEQUANTISED  # quantisation moves the statistics: the twin was needed


@pytest.mark.compat("bfloat16", "float16")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_four_bit_in_low_precision_is_as_close_as_its_twin(tmp_path, dtype: torch.dtype) -> None:
    """Both are compared with the twin in float32: the quantised layer adds no error of its own."""
    base, batches = four_bit(original(), tmp_path, "nf4", dtype), [pad(documents(LENGTHS))]
    dense = twin(base)
    exact = collected(with_lora(copy.deepcopy(dense).float()), batches)
    ours, plain = (worst(collected(with_lora(m), batches), exact) for m in (base, dense))
    assert ours <= 2 * plain


def test_int8_layer_collects_exactly_what_passes_through_it() -> None:
    """LLM.int8 rounds activations inside, so whole models differ; given the same x and d, the sums are the same."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(32, 16, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.randn(16, 32)})
    layer = layer.to("cpu")
    x, d = torch.randn(2, 5, 32), torch.randn(2, 5, 16)
    results = []
    for module in (layer, nn.Linear(32, 16, bias=False)):
        module.requires_grad_(False)
        collector = watching({"l": module})
        with collector.observing():
            collector.reading(torch.ones(10, dtype=torch.bool), torch.device("cpu"), {})
            module(x).backward(d)
        results.append(collector.sums.take_statistics("l", 1, 1.0))
    assert worst({"l": results[0]}, {"l": results[1]}) == 0
    assert distance(results[0].grad, d.flatten(0, 1).T @ x.flatten(0, 1)) <= 1e-6


@pytest.mark.compat("int8")
def test_int8_model_is_close_to_its_twin(tmp_path) -> None:
    base = quantized(original(), tmp_path, load_in_8bit=True)
    batches = [pad(documents(LENGTHS))]
    dense = collected(with_lora(twin(base)), batches)
    assert worst(collected(with_lora(base), batches), dense) <= 0.1  # int8 activations: 1/127 a layer


@pytest.mark.compat("reload")
@pytest.mark.parametrize("config", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_base_bits_stay_and_the_adapter_reloads(tmp_path, config: dict) -> None:
    """The saved adapter is a plain one: on a freshly loaded original base it gives identical logits."""
    base = quantized(original(), tmp_path / "base", **config)
    before = bits(base)
    model = with_lora(base)
    report = initialize_lora_da_weights(model, [pad(documents(LENGTHS))], as_solved(samples=4), show_progress=False)
    assert report.initialized == report.targeted == len(find_adapter(model).layers) == 14
    after = {k.removeprefix(PREFIX).replace("base_layer.", ""): v for k, v in bits(model).items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())

    model.save_pretrained(tmp_path / "adapter")
    again = quantized(original(), tmp_path / "base", **config)
    reloaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    ids = pad(documents(LENGTHS)[:1])["input_ids"]
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model.eval()(ids).logits)
        with reloaded.disable_adapter():
            assert not torch.equal(reloaded(ids).logits, model(ids).logits)
    assert reloaded.peft_config["default"].init_lora_weights is True


def test_the_step_is_relative_to_the_dequantised_weight(tmp_path) -> None:
    base = four_bit(original(), tmp_path, "double-quantisation")
    dense = dict(twin(base).named_parameters())
    for layer in find_adapter(with_lora(base)).layers:
        name = layer.name.removeprefix(PREFIX)
        a, b = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
        step = (layer.scaling * b @ a).norm() / dense[f"{name}.weight"].norm()
        assert layer.relative_step(a, b) == pytest.approx(step.item(), rel=1e-5)
