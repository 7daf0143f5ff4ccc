"""The published procedure, which ours is compared with, computes what it should."""

import pytest
import torch
from collecting import collected, distance
from models import LENGTHS, PREFIX, documents, pad, tiny_llama, with_lora
from tolerances import FLOAT32
from torch.nn import functional as F

pytest.importorskip("bitsandbytes")

from benchmarks.published import full_gradient, group_fisher, layer_groups

pytestmark = pytest.mark.once


def test_the_published_procedure_computes_the_gradient_and_the_fisher() -> None:
    """Summed over single samples of a mean loss each: autograd's own gradient, and our statistics under `samples`."""
    tokens = documents(LENGTHS)
    rows = [{name: torch.tensor(values) for name, values in row.items()} for row in tokens]
    model, device = with_lora(tiny_llama()), torch.device("cpu")
    model.get_base_model().config.use_cache = False
    ours = collected(model, [pad(tokens)], "samples", full=False)

    gradients = full_gradient(model, tokens, device)
    exact = tiny_llama().double()
    for row in rows:
        logits = exact(row["input_ids"][None]).logits[0, :-1].double()
        F.cross_entropy(logits, row["labels"][1:]).backward()
    groups = layer_groups(model)
    assert sorted(name for group in groups for name in group) == sorted(gradients)
    for group in groups:
        covariances, fishers = group_fisher(model, group, tokens, device)
        for name in group:
            short = name.removeprefix(PREFIX)
            truth = exact.get_submodule(short).weight.grad
            assert distance(gradients[name], truth) <= FLOAT32
            assert distance(ours[short].grad * len(rows), truth) <= FLOAT32
            assert distance(fishers[name] / ours[short].n_tokens, ours[short].output_fisher) <= FLOAT32
        for name, covariance in covariances.items():
            short = name.removeprefix(PREFIX)
            assert distance(covariance / ours[short].n_tokens, ours[short].input_cov) <= FLOAT32
    assert all(p.grad is None for p in model.parameters())
