"""Experts that are slices of one parameter: each is started from the tokens it was given, whatever batch and plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from collecting import distance
from expert_oracle import expert_truth
from models import checkpoint, documents, packed, pad
from planning import WAYS, collected_by
from stacks import FAMILIES, stacked, with_experts
from tolerances import FLOAT32, WRONG
from torch import Tensor, nn
from torch.nn import functional as F

from lora_da.model.experts import KnownRows
from lora_da.model.slices import Slice, Stack, products_told

LENGTHS = (9, 14, 6, 11, 7, 13, 8)
ROWS = documents(LENGTHS)
LAYOUTS = {
    "padded": lambda rows: [pad(rows[:3]), pad(rows[3:], "left")],
    "packed": lambda rows: [packed(rows[:4]), packed(rows[4:])],
}


@lru_cache
def truth(family: str, averaging: str):
    return expert_truth(stacked(family), ROWS, averaging)


def off(ours, other) -> float:
    return max(distance(getattr(ours[name], field), value) for name, fs in other.items() for field, value in fs.items())


@pytest.mark.compat("target-parameters", "mixtral", "qwen-moe", "gpt-oss", "deepseek-v3")
@pytest.mark.parametrize("averaging", ["samples", "tokens"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_counts_the_tokens_it_was_given(family: str, way: str, layout: str, averaging: str) -> None:
    if (family, layout) == ("GptOss", "packed"):
        pytest.skip("its eager attention does not tell the documents of a packed row apart, in training neither")
    ours = collected_by(with_experts(stacked(family)), LAYOUTS[layout](ROWS), WAYS[way], averaging)
    assert off(ours, truth(family, averaging)) <= FLOAT32


@pytest.mark.compat("target-parameters", "checkpointing")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_checkpointed_blocks_count_once(family: str, reentrant: bool) -> None:
    model = with_experts(stacked(family))
    checkpoint(model.get_base_model(), reentrant)
    ours = collected_by(model, LAYOUTS["padded"](ROWS), WAYS["3 passes"])
    assert off(ours, truth(family, "tokens")) <= FLOAT32


def test_a_wrong_choice_of_tokens_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the gradients of padding are zero, so it is Z that tells."""
    find = KnownRows.positions_of

    def shifted(known: KnownRows, rows: Tensor) -> Tensor | None:
        found = find(known, rows)
        return None if found is None else (found + 3) % len(known._rows)

    monkeypatch.setattr(KnownRows, "positions_of", shifted)
    assert off(collected_by(with_experts(stacked("Mixtral")), [pad(ROWS)]), truth("Mixtral", "tokens")) > WRONG


class Products(nn.Module):
    """A parameter of three experts, (3, o, i), and whatever is made of it."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (3, 5, 4)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight)


SEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w[1]),
    "linear with a bias": lambda x, w: F.linear(input=x, weight=w[1], bias=x.new_ones(5)),
    "@": lambda x, w: x @ w[1].T,
    "matmul": lambda x, w: torch.matmul(x, w.transpose(1, 2)[1]),
    "mm": lambda x, w: torch.mm(x, w.mT[torch.tensor(1)]),
    "addmm": lambda x, w: torch.addmm(x.new_ones(5), x, w[1].t()),
    "bmm": lambda x, w: torch.bmm(x[None], w.mT[1:2]),
    "view": lambda x, w: x @ w.view(15, 4)[5:10].T,
}


@pytest.mark.parametrize("name", SEEN)
def test_a_product_tells_its_matrix(name: str) -> None:
    module, x = Products(SEEN[name]), torch.randn(6, 4)
    told: list[tuple[Slice, Tensor, Tensor]] = []

    def tell(found: Slice, x: Tensor, output: Tensor) -> Tensor:
        told.append((found, x, output))
        return 2 * output

    expected = module(x)
    with products_told(module, tell):
        assert torch.equal(module(x), 2 * expected)
    assert "forward" not in vars(module) and torch.equal(module(x), expected)
    ((found, seen, output),) = told
    assert found == Slice(Stack(module, "weight", is_transposed=False), 1)
    assert torch.equal(seen.reshape(6, 4), x) and output.shape[-1] == 5
    assert torch.equal(found.weight, module.weight[1]) and found.norm == pytest.approx(module.weight[1].norm().item())


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: F.linear(x, w[1, :3]),  # a part of an expert's
        lambda x, w: F.linear(x, w[1].clone()),
        lambda x, w: F.linear(x, w[1] + 0),
        lambda x, w: torch.bmm(x.expand(3, 6, 4), w.mT),  # all at once
        lambda x, w: torch.einsum("ni,oi->no", x, w[1]),
        lambda x, w: w[1] @ x.T,
        lambda x, w: x @ w[1, 0],  # vectors
        lambda x, w: x[0] @ w[1].T,
    ],
)
def test_anything_else_is_not_told(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    module, told = Products(multiply), list[Slice]()
    with products_told(module, lambda found, x, output: told.append(found) or output):
        module(torch.randn(6, 4))
    assert told == []


def test_a_matrix_that_is_stored_the_other_way_round() -> None:
    module, told = Products(lambda x, w: x @ w[2], (3, 4, 4)), list[Slice]()
    with products_told(module, lambda found, x, output: told.append(found) or output):
        module(torch.randn(6, 4))
    assert told == [Slice(Stack(module, "weight", is_transposed=True), 2)]
    assert torch.equal(told[0].weight, module.weight[2].T)


def test_an_error_inside_leaves_nothing() -> None:
    def broken(x: Tensor, w: Tensor) -> Tensor:
        raise RuntimeError("broken")

    module = Products(broken)
    with pytest.raises(RuntimeError, match="broken"), products_told(module, lambda found, x, output: output):
        module(torch.randn(6, 4))
    assert "forward" not in vars(module) and torch.overrides._get_current_function_mode() is None
