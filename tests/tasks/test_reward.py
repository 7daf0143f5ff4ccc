"""Reward models on pairs: the loss of TRL's RewardTrainer, in float64 by hand; pairs stay together."""

from __future__ import annotations

import pytest
import torch
from classifiers import adapted, classifier
from collecting import worst
from dequantized import dequantized, four_bit
from models import WIDE, tiny_llama, with_lora
from picture import differences, picture
from planning import WAYS, collected_by
from rewards import CENTER, in_batches, losses, pad, pairs, reward_model
from settings import as_solved
from task_oracle import statistics_of
from tolerances import LOSS
from torch.utils.data import DataLoader

from lora_da import LoraDAError, initialize_lora_da_weights
from lora_da.tasks import RewardLoss, find_task

# A float32 model and sums against the float64 oracle: the loss is of a difference of two rewards, in which more is lost
# than elsewhere; 2.04e-5 with some CPUs' kernels.
OF_DIFFERENCES = 3e-5


def check(kind, found, batches, center=None, way=WAYS["one pass"], averaging="tokens"):
    model = adapted(reward_model(kind))
    ours = collected_by(model, batches, way, averaging, reward=RewardLoss(center))
    oracle = statistics_of(reward_model(kind), found, losses(center or 0), list(ours), averaging)
    assert {name: s.n_tokens for name, s in ours.items()} == {name: s.n_tokens for name, s in oracle.items()}
    assert worst(ours, oracle) < OF_DIFFERENCES


@pytest.mark.compat("reward-model")
@pytest.mark.parametrize("center", [None, CENTER])
@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_against_autograd(kind, margins, center):
    found = pairs(margins=margins)
    check(kind, found, in_batches(found, 3), center)


def test_a_config_that_asks_for_tuples_changes_nothing():
    found, model = pairs(), adapted(classifier("Bert", num_labels=1, return_dict=False))
    ours = collected_by(model, in_batches(found, 3), reward=RewardLoss(None))
    oracle = statistics_of(classifier("Bert", num_labels=1), found, losses(0), list(ours), "tokens")
    assert worst(ours, oracle) < OF_DIFFERENCES


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running(way):
    found = pairs(margins=True)
    check("Llama", found, in_batches(found, 3), CENTER, WAYS[way], "samples")


@pytest.mark.parametrize(("size", "extra"), [(1, 0), (2, 3), (7, 0), (7, 9)])
def test_batches_and_padding_change_nothing(size, extra):
    found = pairs(margins=True)
    check("Llama", found, in_batches(found, size, extra), CENTER)


def test_pairs_of_a_dataloader_are_batched_by_length():
    found = pairs(margins=True)
    check("Llama", found, DataLoader(found, 1, collate_fn=pad), CENTER)


def test_pairs_stay_together():
    found = pairs(5, margins=True)
    task = find_task(reward_model(), RewardLoss())
    batch = task.read(pad(found, 3), 100)
    assert batch.tokens.n_documents == 5 and batch.shape[0] == 10
    parts = [batch]
    while any(part.shape[0] > 2 for part in parts):
        parts = [half for part in parts for half in (part.halves() or [part])]
    assert len(parts) == 5
    for pair, part in zip(found, parts, strict=True):
        assert part.tokens.n_documents == 1 and part.halves() is None
        chosen, rejected = (row[row > 0].tolist() for row in part.inputs["input_ids"])
        assert (chosen, rejected) == (pair["chosen"].tolist(), pair["rejected"].tolist())
        assert part.inputs["margin"].tolist() == [pair["margin"].item()] * 2
        assert part.shape[1] == max(len(chosen), len(rejected))


def test_pairs_beyond_the_samples_do_not_count():
    found = pairs(8)
    model, twin = adapted(reward_model()), reward_model().double().eval()
    config = as_solved(samples=5)
    report = initialize_lora_da_weights(model, in_batches(found, 4), config, show_progress=False, reward=RewardLoss())
    expected = torch.stack([losses(0)(twin, pair).detach()[0] for pair in found[:5]]).mean()
    assert (report.samples, report.population_size) == (5, 8)
    assert report.loss == pytest.approx(expected.item(), rel=LOSS)


def test_four_bit_equals_its_dequantised_twin(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = four_bit(reward_model(**WIDE), tmp_path, head="score")
    twin, found = dequantized(base, reward_model(**WIDE)), pairs()
    ours = collected_by(adapted(base), in_batches(found, 3), reward=RewardLoss(CENTER))
    assert worst(ours, statistics_of(twin, found, losses(CENTER), list(ours), "tokens")) < OF_DIFFERENCES


def test_only_the_adapter_changes():
    model = adapted(reward_model())
    before = picture(model)
    report = initialize_lora_da_weights(model, in_batches(pairs(), 3), show_progress=False, reward=RewardLoss(CENTER))
    assert report.initialized == report.targeted == 28
    changed = differences(before, picture(model))
    assert len(changed) == 56 and all("lora_" in line and ": bits" in line for line in changed), changed


BATCH = pad(pairs(3))
REFUSED = {
    "two labels": (lambda: adapted(classifier("Llama", num_labels=2)), BATCH, "has 2 labels.*num_labels=1"),
    "no classifier": (lambda: with_lora(tiny_llama()), BATCH, "LlamaForCausalLM is no reward model"),
    "odd": (None, {k: v[:5] for k, v in BATCH.items()}, r"the chosen rows first, seen shape \(5, .*ForPreference"),
    "no ids": (None, {"attention_mask": BATCH["attention_mask"]}, "the chosen rows first, seen none"),
    "margins": (None, {**BATCH, "margin": torch.zeros(2)}, r"`margin` has shape \(2,\), which does not fit 3 pairs"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kind):
    build, data, message = REFUSED[kind]
    model = adapted(reward_model()) if build is None else build()
    before = picture(model)
    with pytest.raises(LoraDAError, match=message):
        initialize_lora_da_weights(model, [data], show_progress=False, reward=RewardLoss())
    assert differences(before, picture(model)) == []
