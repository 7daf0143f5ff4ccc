"""Layers that read a batch column by column: the statistics of the tokens that count, whatever the padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from classifiers import in_batches as labelled
from classifiers import losses as classified
from classifiers import texts
from collecting import worst
from models import VOCABULARY, documents, pad, seeded, tiny_llama, with_lora
from oracle import oracle_statistics
from planning import Way, collected_by
from task_oracle import statistics_of
from tolerances import FLOAT32
from torch import Tensor
from transformers import (
    LEDConfig,
    LEDForConditionalGeneration,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForSequenceClassification,
)
from translators import in_batches, losses

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.collect.order import Orders, Positions

Change = Callable[[Tensor], Tensor]


def by_column(hidden: Tensor) -> tuple[Tensor, Change]:
    return hidden.transpose(0, 1), lambda out: out.transpose(0, 1)


def in_a_list_of_columns(hidden: Tensor) -> tuple[Tensor, Change]:
    rows, columns = hidden.shape[:2]
    return hidden.transpose(0, 1).flatten(0, 1), lambda out: out.unflatten(0, (columns, rows)).transpose(0, 1)


def in_a_list_of_rows(hidden: Tensor) -> tuple[Tensor, Change]:
    rows, columns = hidden.shape[:2]
    return hidden.flatten(0, 1), lambda out: out.unflatten(0, (rows, columns))


def reordered(**kinds: Callable[[Tensor], tuple[Tensor, Change]]) -> LlamaForCausalLM:
    """A Llama whose `mlp` or `o_proj` reads its input in another order, and computes the same."""
    model = tiny_llama()
    for block in model.model.layers:
        for name, kind in kinds.items():
            module = block.mlp if name == "mlp" else getattr(block.self_attn, name)

            def forward(hidden: Tensor, original: Any = module.forward, kind: Any = kind) -> Tensor:
                changed, back = kind(hidden)
                return back(original(changed))

            module.forward = forward
    return model


def adapted(model: LlamaForCausalLM) -> Any:
    """Layers that are called, not their `forward` alone: what reads in another order is around them."""
    return with_lora(model, target_modules=r".*(q_proj|k_proj|v_proj|gate_proj|up_proj|down_proj)")


LENGTHS = {"oblong": (9, 14, 6, 11), "square": (9, 5, 7, 4, 9, 3, 8, 6, 2), "square, thin": (4, 2, 3, 4, 2, 3, 4, 4)}
KINDS = {
    "by column": {"mlp": by_column},
    "in a list of columns": {"mlp": in_a_list_of_columns},
    "in a list of rows": {"mlp": in_a_list_of_rows},
}


@pytest.mark.parametrize("size", [2, 4, 9], ids="batches of {}".format)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_a_layer_changes_nothing(kind: str, lengths: str, size: int) -> None:
    if (kind, lengths) == ("in a list of columns", "square, thin"):
        pytest.skip("the last tokens have no gradient in the last block, so that all fits a list of rows too")
    rows = documents(LENGTHS[lengths], prompt=1)
    batches = [pad(rows[first : first + size]) for first in range(0, len(rows), size)]
    ours = collected_by(adapted(reordered(**KINDS[kind])), batches)
    assert worst(ours, oracle_statistics(tiny_llama(), rows, list(ours), "tokens")) <= FLOAT32


@pytest.mark.parametrize("way", [Way(cuts=2), Way(parts=3, cut=False)], ids=["streamed", "3 passes"])
@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_the_plan(kind: str, way: Way) -> None:
    rows = documents(LENGTHS["oblong"])
    ours = collected_by(adapted(reordered(**KINDS[kind])), [pad(rows)], way)
    assert worst(ours, oracle_statistics(tiny_llama(), rows, list(ours), "tokens")) <= FLOAT32


LONG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_window": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}


def longformer() -> LongformerForSequenceClassification:
    return seeded(LongformerForSequenceClassification, LongformerConfig(**LONG))


@pytest.mark.compat("by-column")
@pytest.mark.parametrize("size", [1, 4, 8])
def test_longformer(size: int) -> None:
    """Rows of whole windows, which it does not pad by itself."""
    rows = [
        {"input_ids": text, "labels": torch.tensor(n % 3)}
        for n in (4, 8, 12, 8, 4, 8, 12, 8)
        for text in texts(1, n, n, n)
    ]
    model = with_lora(longformer(), task_type="SEQ_CLS", target_modules=["query", "key", "value", "dense"])
    ours = collected_by(model, labelled(rows, size))
    assert worst(ours, statistics_of(longformer(), rows, classified, list(ours), "tokens")) <= FLOAT32


def translations(lengths: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(3, VOCABULARY, (source,), generator=generator),
            "labels": torch.randint(3, VOCABULARY, (target,), generator=generator),
        }
        for source, target in lengths
    ]


def led() -> LEDForConditionalGeneration:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "attention_window": 4, "dropout": 0.0}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    lengths = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    config = LEDConfig(**ids, **sizes, **heads, **lengths, decoder_start_token_id=2)
    return seeded(LEDForConditionalGeneration, config)


@pytest.mark.compat("by-column")
@pytest.mark.parametrize("size", [1, 4])
def test_led(size: int) -> None:
    """The encoder's attention reads by column, the decoder by row; of the second batch both are square."""
    rows = translations([(8, 5), (12, 3), (4, 6), (8, 7), (4, 4), (4, 2), (4, 3), (4, 4)])
    # `global` attention is for tokens that a mask of its own names; without one those layers are not run
    model = with_lora(led(), task_type="SEQ_2_SEQ_LM", target_modules=["query", "key", "value", "output", "fc1", "fc2"])
    ours = collected_by(model, in_batches(rows, size))
    assert worst(ours, statistics_of(led(), rows, losses, list(ours), "tokens")) <= FLOAT32


COUNTS = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
CPU = torch.device("cpu")


def gradient(counts: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zero at positions that do not count."""
    return counts.flatten().float().unsqueeze(-1).expand(-1, 2).reshape(*shape, 2)


def test_a_square_is_told_by_the_zeros_of_its_gradient_and_then_remembered() -> None:
    positions, orders = Positions.counted(COUNTS, CPU), Orders()
    found = orders.chosen("layer", positions, (3, 3))
    assert found is not None and found.by_column is not None
    settled = orders.settled("layer", found, gradient(COUNTS.T, (3, 3)))
    assert settled is not None and sorted(settled.indices.tolist()) == [0, 1, 2, 3, 5, 6]
    again = orders.chosen("layer", positions, (3, 3))
    assert again is not None and again.by_column is None and torch.equal(again.indices, settled.indices)


@pytest.mark.parametrize("seen", [1e-9, float("nan")])
def test_a_list_is_one_of_rows_where_padding_has_a_gradient_too(seen: float) -> None:
    positions, orders = Positions.counted(COUNTS[:2], CPU), Orders()
    found = orders.chosen("list", positions, (6,))
    d = gradient(COUNTS[:2], (6,)).index_fill(0, torch.tensor([5]), seen)
    settled = None if found is None else orders.settled("list", found, d)
    assert settled is not None and settled.indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seen", ["no gradient", "zeros", "live everywhere"])
def test_a_square_that_nothing_tells_is_not_served(seen: str) -> None:
    d = {"no gradient": None, "zeros": torch.zeros(3, 3, 2), "live everywhere": torch.ones(3, 3, 2)}[seen]
    positions, orders = Positions.counted(COUNTS, CPU), Orders()
    found = orders.chosen("layer", positions, (3, 3))
    assert found is not None and orders.settled("layer", found, d) is None
    # another batch, whose shape tells
    assert orders.chosen("layer", Positions.counted(COUNTS[:2], CPU), (2, 3)) is not None
    found = orders.chosen("layer", positions, (3, 3))
    assert found is not None and found.by_column is None and found.indices.tolist() == [0, 1, 2, 3, 6, 7]


def test_a_list_is_one_of_rows_unless_another_layer_reads_by_column() -> None:
    positions, orders = Positions.counted(COUNTS[:2], CPU), Orders()
    found = orders.chosen("list", positions, (6,))
    assert found is not None and orders.settled("list", found, None) is not None
    assert orders.chosen("other", positions, (3, 2)) is not None
    assert orders.settled("list", found, None) is None
    settled = orders.settled("list", found, gradient(COUNTS[:2].T, (6,)))
    assert settled is not None and sorted(settled.indices.tolist()) == [0, 1, 2, 4]


def test_where_all_count_no_order_matters() -> None:
    found = Orders().chosen("layer", Positions.counted(torch.ones(3, 3, dtype=torch.bool), CPU), (3, 3))
    assert found is not None and found.indices is None and found.by_column is None


def test_square_batches_are_divided_where_that_can_be_done() -> None:
    """No gradient is there to tell, so nothing would be served of a square batch."""
    rows = documents(LENGTHS["square"])
    model = adapted(reordered(mlp=by_column))
    settings = LoraDAConfig(samples=len(rows), method="cntlora")
    report = initialize_lora_da_weights(model, [pad(rows)], settings, show_progress=False)
    assert report.initialized == report.targeted
