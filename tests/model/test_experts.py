"""Experts that are ordinary modules: each is started from the tokens it was given, whatever the batch and the plan."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from collecting import collected, distance, worst
from mixtures import Mixture, mixture
from models import IGNORED, LENGTHS, Document, adapter_weights, batches, checkpoint, documents, packed, pad, with_lora
from settings import as_solved
from tolerances import FLOAT32, TURNED, WRONG
from torch import Tensor, nn
from torch.nn import functional as F
from trainers import worst_difference

from lora_da import LoraDAError, initialize_lora_da_weights
from lora_da.model.experts import KnownRows


def expert_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".experts." in name]


def truth(model: nn.Module, rows: list[Document], averaging: str) -> dict[str, dict[str, Tensor]]:
    """G, Z and Y of the experts' layers from float64 documents one by one, every token kept."""
    twin = copy.deepcopy(model).double()
    calls: list[tuple[str, Tensor, Tensor]] = []  # of the running document
    for name in expert_names(twin):
        twin.get_submodule(name).register_forward_hook(lambda _m, a, y, name=name: calls.append((name, a[0], y)))
    xs: dict[str, list[Tensor]] = {name: [] for name in expert_names(twin)}
    ds: dict[str, list[Tensor]] = {name: [] for name in xs}
    n_loss = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
    for document, n in zip(batches(rows, 1), n_loss, strict=True):
        calls.clear()
        logits = twin(input_ids=document["input_ids"], use_cache=False).logits[0, :-1].double()
        loss = F.cross_entropy(logits, document["labels"][0, 1:], reduction="sum")
        loss = loss / (n if averaging == "samples" else 1)
        gradients = torch.autograd.grad(loss, [y for _, _, y in calls])
        for (name, x, _), d in zip(calls, gradients, strict=True):
            xs[name].append(x.detach())
            ds[name].append(d)
    units = len(rows) if averaging == "samples" else sum(n_loss)
    found = {}
    for name in xs:
        x, d = torch.cat(xs[name]), torch.cat(ds[name])
        found[name] = {"grad": d.T @ x / units, "input_cov": x.T @ x / len(x), "output_fisher": d.T @ d / len(d)}
    return found


def off(ours: dict, other: dict[str, dict[str, Tensor]]) -> float:
    return max(distance(getattr(ours[name], field), value) for name, fs in other.items() for field, value in fs.items())


@pytest.mark.compat("experts")
@pytest.mark.parametrize("averaging", ["samples", "tokens"])
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize(
    "layout", [lambda rows: [pad(rows)], lambda rows: [pad(rows, "left")], lambda rows: [packed(rows)]]
)
def test_an_expert_counts_the_tokens_it_was_given(averaging: str, reentrant: bool | None, layout) -> None:
    """Padding goes through experts too, and must not count."""
    rows, model = documents(LENGTHS), with_lora(mixture())
    if reentrant is not None:
        checkpoint(model.get_base_model(), reentrant)
    assert off(collected(model, layout(rows), averaging), truth(mixture(), rows, averaging)) <= FLOAT32


def test_layers_of_an_expert_are_told_apart_from_each_other() -> None:
    """Where memory is short, each has a run of its own: `down_proj` without those that read what its expert does."""
    rows, targets = documents(LENGTHS), ["gate_proj", "up_proj", "down_proj"]
    together, apart = (with_lora(mixture(), target_modules=targets) for _ in range(2))
    for model, budget in ((together, None), (apart, 1e-6)):
        config = as_solved(samples=4, population_size=100, memory_budget=budget)
        report = initialize_lora_da_weights(model, [pad(rows)], config, show_progress=False)
        assert report.initialized == report.targeted == 24
    assert "each run 12 times" in report.plan
    assert worst_difference(adapter_weights(apart), adapter_weights(together)) < TURNED


def test_rows_that_are_alike_are_told_apart_by_their_order() -> None:
    """The first tokens of these documents are the same, so are their hidden states, and one document counts double."""
    rows = documents(LENGTHS)
    for row in rows:
        row["input_ids"][0] = 5
    assert off(collected(with_lora(mixture()), [pad(rows)], "samples"), truth(mixture(), rows, "samples")) <= FLOAT32


def test_a_wrong_choice_of_tokens_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = documents(LENGTHS)
    right = collected(with_lora(mixture()), [pad(rows)])

    find = KnownRows.positions_of

    def shifted(known: KnownRows, rows: Tensor) -> Tensor | None:
        found = find(known, rows)
        return None if found is None else (found + 3) % len(known._rows)

    monkeypatch.setattr(KnownRows, "positions_of", shifted)
    assert worst(collected(with_lora(mixture()), [pad(rows)]), right) > WRONG


@pytest.mark.compat("experts")
def test_an_expert_without_tokens_keeps_pefts_init_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = with_lora(mixture(closed=2))
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    with caplog.at_level(logging.WARNING, "lora_da"):
        report = initialize_lora_da_weights(
            model,
            [pad(documents(LENGTHS))],
            as_solved(samples=4, population_size=100),
            show_progress=False,
        )
    kept = {name for name in report.left if "experts.2." in name}
    assert len(report.left) == len(kept) == 6 and report.initialized == report.targeted - 6
    for name, value in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(value, before[name]) == ("experts.2." in name), name
    assert any("experts.2." in r.getMessage() and "no token" in r.getMessage() for r in caplog.records)


def test_positions_of_rows() -> None:
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        among = torch.randn(50, 8, generator=g).to(dtype)
        picked = torch.tensor([40, 3, 17, 3 + 4, 0])
        assert torch.equal(KnownRows(among).positions_of(among[picked]), picked)
        among[7] = among[3]  # alike, and taken in their order
        assert torch.equal(KnownRows(among).positions_of(among[torch.tensor([3, 9, 7])]), torch.tensor([3, 9, 7]))
        assert KnownRows(among).positions_of(among[:3] + 1) is None
        assert KnownRows(among).positions_of(among[torch.tensor([9, 9])]) is None  # a row that is there once only
        assert KnownRows(among).positions_of(among[:0]).shape == (0,)


def test_experts_that_are_never_called_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may compute the mixture from its weights and pass the layers by."""
    model = with_lora(mixture(), target_modules=r".*experts.*_proj")

    def fused(self: Mixture, x: Tensor) -> Tensor:
        e = self.experts[0]
        weights = [layer.base_layer.weight for layer in (e.gate_proj, e.up_proj, e.down_proj)]
        return F.linear(F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1]), weights[2])

    monkeypatch.setattr(Mixture, "forward", fused)
    with pytest.raises(LoraDAError, match="experts.*never seen with a token.*fused kernel"):
        initialize_lora_da_weights(
            model,
            [pad(documents(LENGTHS))],
            as_solved(samples=4, population_size=100),
            show_progress=False,
        )
