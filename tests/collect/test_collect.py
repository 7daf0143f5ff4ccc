"""Statistics from the hooks: the oracle's, however the documents are batched, packed, padded or checkpointed."""

import copy

import pytest
import torch
from collecting import collected, distance, watching, worst
from models import (
    IGNORED,
    LENGTHS,
    NO_DROPOUT,
    PADDING,
    Document,
    batches,
    checkpoint,
    documents,
    packed,
    pad,
    tiny_gpt2,
    tiny_llama,
    with_lora,
)
from oracle import objective, oracle_solve, oracle_statistics, projector
from peft import PeftModel
from solving import solve_lora_da
from tolerances import EXACT, FLOAT32, TURNED, WRONG
from torch import nn
from torch.nn import functional as F

from lora_da.model.state import estimation_mode

NUMBERS = {
    "population": 1000.0,
    "variance_weight": 1.0,
    "damping": 0.1,
    "relative_damping": True,
    "gamma": 1024.0,
    "normalize_step": True,
}


def linear_names(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head]


def oracle(model: nn.Module, rows: list[Document], averaging: str = "tokens") -> dict:
    return oracle_statistics(model, rows, linear_names(model), averaging)


@pytest.mark.compat("float32", "lora", "conv1d")
@pytest.mark.parametrize("averaging", ["samples", "tokens"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_equal_to_the_oracle(build, averaging: str) -> None:
    rows = documents(LENGTHS)
    ours = collected(with_lora(build()), batches(rows, 1), averaging)
    assert worst(ours, oracle(build(), rows, averaging)) <= FLOAT32
    assert all(s.n_tokens == sum(LENGTHS) for s in ours.values())


def checkpointed(base: nn.Module, reentrant: bool | None) -> PeftModel:
    model = with_lora(base)
    if reentrant is not None:
        checkpoint(model.get_base_model(), reentrant)
    return model


def numbered(rows: list[Document]) -> dict:
    """Pack as Axolotl does: a mask that numbers the documents beside the positions, and padding that starts anew."""
    mask = torch.tensor([[number for number, row in enumerate(rows, 1) for _ in row["labels"]]])
    filling = {"input_ids": PADDING, "labels": IGNORED, "attention_mask": 0}
    batch = packed(rows) | {"attention_mask": mask}
    batch = {k: torch.cat([v, torch.full((1, 5), filling.get(k, 0))], 1) for k, v in batch.items()}
    batch["position_ids"][0, -5:] = torch.arange(5)
    return batch


LAYOUTS = {
    "single": lambda rows: batches(rows, 1),
    "one batch": lambda rows: [pad(rows)],
    "left padding": lambda rows: [pad(rows, "left")],
    "two batches, reversed": lambda rows: [pad(rows[:1:-1]), pad(rows[1::-1])],
    "packed": lambda rows: [packed(rows)],
    "packed, numbered mask": lambda rows: [numbered(rows)],
    "packed twice": lambda rows: [packed(rows[:3]), packed(rows[3:])],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_nothing_but_the_documents_matters(layout: str, reentrant: bool | None) -> None:
    """Batch split and order, padding, packing and checkpointing change nothing, under either averaging."""
    rows = documents(LENGTHS)
    for averaging in ("samples", "tokens"):
        ours = collected(checkpointed(tiny_llama(), reentrant), LAYOUTS[layout](rows), averaging)
        assert worst(ours, oracle(tiny_llama(), rows, averaging)) <= FLOAT32


def subspaces(statistics: dict) -> dict[str, torch.Tensor]:
    """(i, 4) of each layer."""
    solved = {name: solve_lora_da(s, 4, **NUMBERS) for name, s in statistics.items()}
    return {name: torch.linalg.qr(factors.lora_A.T.double()).Q for name, factors in solved.items()}


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_subspaces_agree_where_the_statistics_do(reentrant: bool | None) -> None:
    """In float32 the projectors; in bf16, where near ties may turn, the objective at either subspace."""
    rows = documents((19, 24, 16, 21, 18, 23))
    for dtype in (torch.float32, torch.bfloat16):
        one = collected(with_lora(tiny_llama().to(dtype)), batches(rows, 1))
        other = collected(checkpointed(tiny_llama().to(dtype), reentrant), [packed(rows[:4]), pad(rows[4:])])
        mine, theirs = subspaces(one), subspaces(other)
        for name, s in one.items():
            if dtype == torch.float32:
                assert distance(projector(theirs[name]), projector(mine[name])) <= TURNED
                continue
            omega = oracle_solve(s.grad, s.input_cov, s.output_fisher, 4, **NUMBERS).omega
            least = objective(omega, mine[name])
            assert abs(objective(omega, theirs[name]) - least) <= 0.01 * abs(least)


def test_a_wrong_mask_shows() -> None:
    """Negative controls: padding counted as text, packed documents taken for one, the two averagings exchanged."""
    rows = documents(LENGTHS)
    truth = oracle(tiny_llama(), rows)
    unmasked = pad(rows) | {"attention_mask": torch.ones(len(rows), 14, dtype=torch.long)}
    leaking = {k: v for k, v in packed(rows).items() if k != "position_ids"}
    assert worst(collected(with_lora(tiny_llama()), [unmasked]), truth) > WRONG
    assert worst(collected(with_lora(tiny_llama()), [leaking]), truth) > WRONG
    assert worst(collected(with_lora(tiny_llama()), [pad(rows)], "samples"), truth) > WRONG


def test_masked_tokens_carry_no_loss_and_padding_no_weight() -> None:
    batch = pad(documents(LENGTHS))
    before = collected(with_lora(tiny_llama()), [batch])
    batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 55, batch["input_ids"])
    assert worst(collected(with_lora(tiny_llama()), [batch]), before) <= FLOAT32
    batch["labels"][0, 5] = -100  # a loss token less
    assert worst(collected(with_lora(tiny_llama()), [batch]), before) > WRONG / 10


def loss_of(model: nn.Module, document: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(document["input_ids"]).logits[0, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, document["labels"][0, 1:], reduction="sum", ignore_index=IGNORED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grad_is_autograds_weight_grad(dtype: torch.dtype) -> None:
    """G of the collector is `weight.grad`: to rounding in float64, as close to the truth as autograd's own in bf16."""
    base, documents_alone = tiny_gpt2(**NO_DROPOUT).to(dtype), batches(documents(LENGTHS), 1)
    names = linear_names(base)
    exact = copy.deepcopy(base).double()
    for model in (base, exact):
        for document in documents_alone:
            loss_of(model, document).backward()

    summed = copy.deepcopy(base)
    collector = watching({n: summed.get_submodule(n) for n in names})
    summed.requires_grad_(False)
    with collector.observing():
        for document in documents_alone:
            n = document["labels"].numel()
            collector.reading(torch.ones(n, dtype=torch.bool), torch.device("cpu"), {})
            loss_of(summed, document).backward()
    for name in names:
        ours = collector.sums.take_statistics(name, 1, 1.0).grad.T  # Conv1D keeps its weight (i, o)
        truth = exact.get_submodule(name).weight.grad
        plain = distance(base.get_submodule(name).weight.grad, truth)
        assert distance(ours, truth) <= plain + {torch.float64: EXACT, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]


def test_one_token_makes_kfac_exact() -> None:
    """The K-FAC block Y ⊗ Z of one counted token is the outer product of the gradient with itself."""
    layer, x = nn.Linear(5, 3, dtype=torch.float64), torch.randn(1, 1, 5, dtype=torch.float64)
    collector = watching({"l": layer}, full=True)
    with collector.observing():
        collector.reading(torch.ones(1, dtype=torch.bool), torch.device("cpu"), {})
        layer(x).square().sum().backward()
    s = collector.sums.take_statistics("l", 1, 1.0)
    g = layer.weight.grad.flatten()
    assert distance(s.grad, layer.weight.grad) <= EXACT
    assert distance(torch.kron(s.output_fisher, s.input_cov), torch.outer(g, g)) <= EXACT


def test_layers_that_read_one_tensor_share_their_covariance() -> None:
    base = tiny_llama()
    names = linear_names(base)
    collector = watching({n: base.get_submodule(n) for n in names})
    base.requires_grad_(False)
    ids = pad(documents(LENGTHS)[:1])["input_ids"]
    with collector.observing():
        collector.reading(torch.ones(ids.numel(), dtype=torch.bool), torch.device("cpu"), {})
        base(ids).logits.logsumexp(-1).sum().backward()
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(collector.sums.reads_like[name], set()).add(name.split(".")[-1])
    assert sorted(map(sorted, groups.values())) == sorted(
        [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    )


def test_dropout_in_train_mode_is_off_for_the_statistics() -> None:
    rows = documents(LENGTHS)
    model = with_lora(tiny_llama(attention_dropout=0.5), lora_dropout=0.5)
    assert worst(collected(model, [pad(rows)]), oracle(tiny_llama(), rows)) <= FLOAT32
    model = with_lora(tiny_llama(attention_dropout=0.5)).train()
    ids = pad(rows[:1])["input_ids"]
    assert not torch.equal(model(ids).logits, model(ids).logits)  # the noise is there
    with estimation_mode(model):
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.compat("float16")
@pytest.mark.parametrize("scale_overflows", [False, True])
def test_float16_is_scaled_and_unscaled(scale_overflows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 statistics are float32's within float16's precision; an overflow starts anew with a lower scale."""
    rows, half = documents(LENGTHS), with_lora(tiny_llama().half())
    if scale_overflows:
        monkeypatch.setattr("lora_da.collect.scaling.LOSS_SCALE", 2.0**22)
        monkeypatch.setattr("lora_da.collect.scaling.LOSS_SCALE_STEP", 2.0**6)
    ours = collected(half, [pad(rows)])
    truth = oracle(tiny_llama().half(), rows)
    assert worst(ours, truth) <= 0.02
    assert all(torch.isfinite(s.grad).all() and s.grad.dtype == torch.float32 for s in ours.values())


def test_bfloat16_autocast_is_within_bfloat16_of_the_truth() -> None:
    rows = documents(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        ours = collected(with_lora(tiny_llama()), [pad(rows)])
    truth = oracle(tiny_llama(), rows)
    assert FLOAT32 < worst(ours, truth) <= 0.05  # below: autocast would not have been on
