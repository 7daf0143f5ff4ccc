"""A decoder whose blocks are more than a row: it is found out, and its statistics are the oracle's all the same."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ATTENTION, BLOCKS, LLAMA
from collecting import worst
from models import PREFIX, documents, pad, seeded, with_lora
from oracle import oracle_statistics
from planning import Forced, Way, recorded
from settings import as_solved
from tolerances import FLOAT32
from torch import Tensor, nn
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.collect.plan import Plan

ROWS = documents((9, 9, 9, 9))  # of one length, so that nothing but the values can give a block away
BATCHES = {"one batch": [pad(ROWS)], "one row each": [pad([row]) for row in ROWS]}


def llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> LlamaForCausalLM:
    return seeded(kind, LlamaConfig(**LLAMA.config))


class Parks(nn.Module):
    """A block that leaves its output where a later block finds it."""

    def __init__(self, block: nn.Module, shared: SimpleNamespace, detached: bool = False) -> None:
        super().__init__()
        self.block, self.shared, self.detached = block, shared, detached

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        output = self.block(hidden_states, **kwargs)
        self.shared.value = output.detach() if self.detached else output
        return output


class Finds(Parks):
    """A block that reads what an earlier one has left."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.block(hidden_states, **kwargs) + self.shared.value


def parked(by: int, read_by: int, detached: bool) -> LlamaForCausalLM:
    model, shared = llama(), SimpleNamespace(value=None)
    blocks = model.model.layers
    blocks[by], blocks[read_by] = Parks(blocks[by], shared, detached), Finds(blocks[read_by], shared)
    return model


class Between(LlamaForCausalLM):
    """The decoder multiplies the hidden state between two of its blocks."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = Halved(self.model.layers)


class Halved(nn.ModuleList):
    """Blocks that are handed out with a multiplication in between."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if not isinstance(index, slice):
            return found
        return [*list(found)[:2], lambda hidden, **kwargs: hidden * 1.5, *list(found)[2:]]


def initialised(base: PreTrainedModel, batches: list[dict[str, Tensor]], way: Way) -> tuple[list[Plan], float]:
    """The plans that were made, and how far the statistics are from the oracle's."""
    model = with_lora(copy.deepcopy(base), target_modules=ATTENTION)
    names = [layer.name.removeprefix(PREFIX) for layer in find_adapter(model).layers]
    config = LoraDAConfig(samples=len(ROWS), preset="paper", averaging="tokens")
    planner = Forced(way)
    with recorded() as ours:
        initialize_lora_da_weights(model, batches, config, show_progress=False, plan=planner)
    return planner.plans, worst(ours, oracle_statistics(base, ROWS, names, "tokens"))


def test_the_unchanged_decoder_streams() -> None:
    """The control of the others."""
    for batches in BATCHES.values():
        (plan,), off = initialised(llama(), batches, Way(cuts=2))
        assert plan.cuts == 2 and off <= FLOAT32


@pytest.mark.parametrize("cuts", [2, BLOCKS])
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize(("by", "read_by"), [(0, 2), (0, 3), (1, 2), (2, 3)])
def test_what_one_block_leaves_for_another(
    by: int, read_by: int, detached: bool, batches: str, cuts: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lora_da"):
        plans, off = initialised(parked(by, read_by, detached), BATCHES[batches], Way(cuts=cuts))
    assert off <= FLOAT32
    if plans[-1].cuts == 1:
        assert plans[-1].why_not_streamed
        assert plans[0].why_not_streamed or "not streamed, in several passes instead" in caplog.text


@pytest.mark.compat("unknown-architecture")
@pytest.mark.parametrize("batches", BATCHES)
def test_what_the_decoder_does_between_blocks(batches: str) -> None:
    base = seeded(Between, LlamaConfig(**LLAMA.config))
    plain = llama()
    plain.load_state_dict(base.state_dict())
    ids = BATCHES["one row each"][0]["input_ids"]
    assert not torch.allclose(base(ids).logits, plain(ids).logits)  # it does something
    (plan,), off = initialised(base, BATCHES[batches], Way(cuts=2))
    assert off <= FLOAT32 and plan.cuts == 1 and plan.passes == 2
    assert "block 2 does not read what block 1 returns" in plan.why_not_streamed
    assert plan.why_not_streamed in plan.line()


def test_a_block_that_is_left_out() -> None:
    """A decoder that runs fewer blocks than it holds."""
    base = llama()
    base.config.num_hidden_layers = BLOCKS - 1
    model = with_lora(base, target_modules=["q_proj"], layers_to_transform=[0, 1])
    planner, config = Forced(Way(cuts=2)), as_solved(samples=4)
    initialize_lora_da_weights(model, BATCHES["one batch"], config, show_progress=False, plan=planner)
    assert planner.plans[-1].why_not_streamed == f"{BLOCKS - 1} of its {BLOCKS} blocks ran"


def test_keys_and_values_that_later_blocks_share() -> None:
    """Gemma 3n hands the keys and values of one block to later ones, beside the hidden state."""
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"layer_types": kinds, "sliding_window": 3, "num_kv_shared_layers": 2}
    widths = {"head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "laurel_rank": 4}
    sparsity = {"activation_sparsity_pattern": None, "intermediate_size": [48] * BLOCKS}
    base = seeded(Gemma3nForCausalLM, Gemma3nTextConfig(**{**LLAMA.config, **shared, **widths, **sparsity}))
    for batches in BATCHES.values():
        plans, off = initialised(base, batches, Way(cuts=2))
        assert off <= FLOAT32
        assert plans[-1].cuts == 1 and plans[-1].why_not_streamed
