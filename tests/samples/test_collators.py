"""The batches of the collators that people use, counted as a walk over their documents counts them."""

from __future__ import annotations

import pytest
from counting import MANY, RANDOM_LAYOUTS, check, expected, limits, packed_rows
from hypothesis import given
from models import IGNORED
from transformers import DataCollatorWithFlattening


@RANDOM_LAYOUTS
@given(packed_rows, limits)
def test_flattening_collator_of_transformers(rows, limit):
    documents = [tokens for row in rows for tokens in row]
    features = [{"input_ids": [7] * len(tokens), "labels": tokens} for tokens in documents]
    for options in ({}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)(features)
        check(batch, expected([documents], limit), limit)


@pytest.mark.filterwarnings("default")  # TRL's import warns of its dependencies
@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("multiple", [None, 8])
def test_collator_of_trl(padding_free, multiple):
    """TRL's collator on rows of one document, padded or flattened."""
    collator_class = trl_collator()
    rows = [[[IGNORED, IGNORED, 5, 6, 7]], [[8, 9, 10]], [[11]], [[IGNORED, 12]]]
    examples = [{"input_ids": [7] * len(row[0]), "labels": row[0]} for row in rows]
    batch = collator_class(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=multiple)(examples)
    layout = [[tokens for row in rows for tokens in row]] if padding_free else rows
    tokens = check(batch, expected(layout, MANY, width=batch["labels"].shape[1]))
    assert (tokens.boundaries == "row") is not padding_free


@pytest.mark.filterwarnings("default")
def test_collator_of_trl_on_packed_rows():
    """TRL's packing: rows of several documents with their `seq_lengths`, flattened."""
    collator_class = trl_collator()
    rows = [[[1, 2, 3], [4, 5]], [[6], [7, IGNORED, 9], [IGNORED, IGNORED]]]
    examples = [
        {
            "input_ids": [7] * sum(map(len, row)),
            "labels": [label for tokens in row for label in tokens],
            "seq_lengths": [len(tokens) for tokens in row],
        }
        for row in rows
    ]
    batch = collator_class(pad_token_id=0, padding_free=True, pad_to_multiple_of=16)(examples)
    layout = [[tokens for row in rows for tokens in row]]
    check(batch, expected(layout, MANY, width=16))


def trl_collator():
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling


@pytest.mark.axolotl
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_multipack_collator_of_axolotl(squash, side):
    pytest.importorskip("axolotl", reason="Axolotl is not installed")
    from axolotl.utils.collators import V2BatchSamplerDataCollatorForSeq2Seq

    rows = [[[1, 2, 3], [IGNORED, 5]], [[6, 7, 8], [9], [IGNORED, 10, 11]]]
    examples = [
        [
            {
                "input_ids": [7] * len(tokens),
                "labels": tokens,
                "attention_mask": [1] * len(tokens),
                "position_ids": list(range(len(tokens))),
            }
            for tokens in row
        ]
        for row in rows
    ]
    batch = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer(side), pad_to_multiple_of=4, squash_position_ids=squash)(
        examples
    )
    check(batch, expected(rows, MANY, width=8, side=side))


def tokenizer(side):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", padding_side=side)
