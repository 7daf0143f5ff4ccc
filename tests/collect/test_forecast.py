"""What running takes, where it was counted as autograd saves it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from architectures import BLOCKS, LLAMA
from collecting import needs
from expert_oracle import stacks_of
from models import PREFIX, documents, pad, with_lora
from planning import surveyed_model
from stacks import stacked, with_experts
from torch import Tensor, nn

from lora_da.adapter import find_adapter
from lora_da.collect.forecast import Forecast, Segment
from lora_da.collect.survey import Survey
from lora_da.tasks.head import CHUNK

pytestmark = pytest.mark.once

ROWS = documents((13, 13))
TOKENS, COLUMNS = 26, 13


def noting(saved: list[Tensor]) -> AbstractContextManager[None]:
    """Note what is saved for the backward."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)


def running(survey: Survey, cuts: int, checkpointed: bool = False) -> int:
    """What the topmost of some segments takes."""
    topmost = Segment(BLOCKS - BLOCKS // cuts, BLOCKS, ())
    return Forecast(survey, TOKENS, COLUMNS, 0, CHUNK, needs(), checkpointed, 0).running(topmost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_eager_attention(dtype: torch.dtype) -> None:
    """Those of every block that is kept, each once in float32 and, where that is another, in the model's dtype."""
    base = LLAMA.base().to(dtype)
    base.set_attn_implementation("eager")
    saved: list[Tensor] = []
    with noting(saved):
        base.model(**{k: v for k, v in pad(ROWS).items() if k in ("input_ids", "attention_mask")})
    scores = {t.untyped_storage().data_ptr(): t for t in saved if t.shape[-2:] == (COLUMNS, COLUMNS)}
    kept = sum(t.nbytes for t in scores.values() if t.shape.numel() % base.config.num_attention_heads == 0)
    survey = surveyed_model(with_lora(base, r=2), [pad(ROWS)])
    assert survey.eager_heads == base.config.num_attention_heads
    without = replace(survey, eager_heads=0)
    for cuts, checkpointed, blocks in ((1, False, 4), (2, False, 2), (4, False, 1), (1, True, 1)):
        counted = running(survey, cuts, checkpointed) - running(without, cuts, checkpointed)
        assert kept * blocks / 4 <= counted <= 4 * kept * (blocks + 1) / 4


def test_adapters_do_not_count_as_layers_of_a_block() -> None:
    """They are off while statistics are taken: whatever their rank, a block has the widths of its own layers."""
    own = [layer for layer in LLAMA.base().model.layers[0].modules() if isinstance(layer, nn.Linear)]
    widths = sum(layer.in_features + layer.out_features for layer in own)
    for rank in (2, 8):
        assert surveyed_model(with_lora(LLAMA.base(), r=rank), [pad(ROWS)]).linear_features == (widths,) * BLOCKS


def test_a_kernel_writes_no_scores() -> None:
    base = LLAMA.base()
    base.set_attn_implementation("sdpa")
    assert surveyed_model(with_lora(base, r=2), [pad(ROWS)]).eager_heads == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_autocast_copies(dtype: torch.dtype) -> None:
    """Each block's until its backward, the head's while it runs; none where they are in its dtype already."""
    base = LLAMA.base().to(dtype).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        survey = surveyed_model(with_lora(base, r=2, target_modules=["lm_head"]), [pad(ROWS)])  # no adapter in blocks
        base = LLAMA.base().to(dtype).requires_grad_(False)
        copied: dict[str, int] = {}
        for name, layer in base.named_modules():
            if isinstance(layer, nn.Linear):
                saved: list[Tensor] = []
                with noting(saved):
                    layer(torch.randn(1, layer.in_features, dtype=dtype, requires_grad=True))
                weight = layer.weight.data_ptr()
                copied[name] = sum(t.nbytes for t in saved if t.data_ptr() != weight)
    assert survey.cast_head == copied.pop("lm_head") == (dtype == torch.float32) * 2 * base.lm_head.weight.numel()
    assert sum(survey.kept_weights) == sum(copied.values())
    assert running(survey, 4) - running(replace(survey, cast_head=0), 4) == survey.cast_head


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_in_one_parameter(family: str) -> None:
    """What their products keep for the backward, a token's of the experts that it is routed to; and a sum for each."""
    base = stacked(family).requires_grad_(False)
    survey = surveyed_model(with_experts(base), [pad(ROWS)])
    layers = find_adapter(with_experts(stacked(family))).layers
    (name, module), *_ = stacks_of(stacked(family).requires_grad_(False)).items()
    saved: list[Tensor] = []
    hidden = torch.randn(TOKENS, base.config.hidden_size, requires_grad=True)
    index = torch.stack([torch.arange(TOKENS) % 4, (torch.arange(TOKENS) + 1) % 4], dim=1)
    with noting(saved):
        module(hidden, index, torch.rand(TOKENS, 2))
    ours = {p.untyped_storage().data_ptr() for p in (*module.parameters(), hidden)}
    floats = {t.untyped_storage().data_ptr(): t for t in saved if t.is_floating_point()}
    kept = sum(t.untyped_storage().nbytes() for place, t in floats.items() if place not in ours)
    block = stacked(family).model.layers[0]
    of_linear = sum(m.in_features + m.out_features for m in block.modules() if isinstance(m, nn.Linear))
    forecast = survey.kept * TOKENS * (survey.linear_features[0] - of_linear)
    assert kept / 2 <= forecast <= 4 * kept
    needed = Forecast(survey, TOKENS, COLUMNS, 0, CHUNK, needs(), False, 0)
    experts = [layer for layer in layers if layer.name.startswith(f"{PREFIX}{name}.")]
    assert len(experts) == 8
    numbers = sum(a.in_features**2 + a.in_features * a.out_features + a.out_features**2 for a in experts)
    assert needed.sums(experts) == 4 * numbers
