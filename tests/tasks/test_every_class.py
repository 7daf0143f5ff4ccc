"""Every language model of transformers: served with its own loss and gradients, or refused in a sentence that is true.

Those that cannot be built or run here are skipped, with the reason; `make classes` lists all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from every_class import NotRun, batch_for, built, names, outcome_of, own_of
from models import IGNORED
from tolerances import LOSS
from transformers import PreTrainedModel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# float32 against float64, after recurrences and exponentials of the models' own; most are off by 1e-6
STEEP = 5e-4

Truth: TypeAlias = Callable[[PreTrainedModel, re.Match[str]], bool]


def compares_with(model: PreTrainedModel, behind: int) -> bool:
    """Whether its loss is the cross-entropy of each token's logits with the label that is so many behind."""
    batch = batch_for(model)
    logits = model(**batch, use_cache=False).logits
    shifted = torch.nn.functional.pad(batch["labels"], (0, behind), value=IGNORED)[:, behind:]
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
    return model(**batch, use_cache=False).loss.item() == pytest.approx(entropy.item(), rel=LOSS)


def is_of_no_token(model: PreTrainedModel, shape: list[int]) -> bool:
    """Whether an input of this shape is not one vector for each token of the source or the target."""
    batch = batch_for(model)
    return len(shape) != 3 or shape[:2] not in [list(batch[name].shape) for name in ("input_ids", "labels")]


# What the sentences say, and whether it is so.
SENTENCES: dict[str, Truth] = {
    r"compares the logits of a token with its own label, ": lambda model, _: compares_with(model, 0),
    r"compares the logits of a token with the label (\d+) behind it, ": lambda model, m: compares_with(
        model, int(m[1])
    ),
    r"has no language-model head": lambda model, _: model.get_output_embeddings() is None,
    r"reads `(\w+)`; ": lambda model, m: model.main_input_name == m[1] != "input_ids",
    # of several tokens at once, or with images that it cannot do without
    r"the head of \w+ cannot be run on": lambda model, _: (
        hasattr(model.config, "ngram") or "pixel" in model.main_input_name
    ),
    r"its input has shape \(([\d, ]+)\), in which the tokens of the batch cannot be found": lambda model, m: (
        is_of_no_token(model, [int(size) for size in m[1].split(",")])
    ),
    r"layer base_model\.model\.(\S+) read the same input as \S+ at first and another one later": lambda model, m: (
        own_of(model, batch_for(model)).calls[m[1]] > 1
    ),
}


@pytest.mark.compat("every-class")
@pytest.mark.parametrize("name", names())
def test_it_is_served_or_refused(name: str) -> None:
    try:
        outcome = outcome_of(name)
    except NotRun as reason:
        pytest.skip(f"{name}: {reason}")
    if outcome.kind == "served":
        assert outcome.loss_off <= LOSS
        assert outcome.failed == {} and max(outcome.off.values()) <= STEEP
        return
    said = [(match, truth) for pattern, truth in SENTENCES.items() if (match := re.search(pattern, outcome.sentence))]
    assert len(said) == 1, outcome.sentence
    (match, truth), *_ = said
    assert truth(built(name), match), outcome.sentence


def test_no_truth_holds_of_everything() -> None:
    """A Llama is none of what the sentences say."""
    model = built("LlamaForCausalLM")
    assert compares_with(model, 1) and not compares_with(model, 0) and not compares_with(model, 2)
    assert not is_of_no_token(model, [*batch_for(model)["input_ids"].shape, 32])
    assert model.get_output_embeddings() is not None and model.main_input_name == "input_ids"
    outcome = outcome_of("LlamaForCausalLM")
    assert outcome.kind == "served" and max(outcome.off.values()) > 0 and not math.isnan(outcome.loss_off)
