"""The losses of rows are the model's own, row by row, whatever they are batched with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import documents, few_tokens, pad, tiny_gpt2, tiny_llama
from picture import differences, picture
from tolerances import LOSS

from lora_da import LoraDAError
from lora_da.doctor.losses import answer_alone, row_losses
from lora_da.findings import RowLoss
from lora_da.samples.facts import row_facts
from lora_da.tasks import find_task

CPU = torch.device("cpu")
ROWS = few_tokens(documents(24, shortest=6, longest=40))


def losses_of(model: Any, rows: Any = ROWS) -> list[RowLoss]:
    facts = [row_facts(n, row["input_ids"], row["labels"]) for n, row in enumerate(rows)]
    return row_losses(find_task(model), rows, facts, CPU, show_progress=False)


def own_loss(model: Any, row: Any) -> float:
    """Summed, by the model's forward on that row alone."""
    batch = pad([row])
    model.eval()
    with torch.no_grad():
        return model(**batch).loss.item() * int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("kind", [tiny_llama, tiny_gpt2])
def test_losses_are_the_models_own(kind: Any) -> None:
    model = kind()
    found = losses_of(model)
    assert [loss.row for loss in found] == list(range(len(ROWS)))
    for row, loss in zip(ROWS, found, strict=True):
        assert loss.loss == pytest.approx(own_loss(model, row), rel=LOSS)
        answer = answer_alone(row)
        assert answer is not None and loss.alone == pytest.approx(own_loss(model, answer), rel=LOSS)
        assert loss.loss_tokens == sum(label != -100 for label in row["labels"][1:])
        assert loss.mean * loss.loss_tokens == pytest.approx(loss.loss) and loss.help == loss.alone - loss.loss


def test_a_row_that_is_all_answer_has_no_prompt() -> None:
    assert answer_alone({"input_ids": [4, 5, 6], "labels": [4, 5, 6]}) is None
    assert answer_alone({"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}) is None
    assert answer_alone({"input_ids": [3, 4, 5, 6, 7], "labels": [-100, -100, 5, -100, 7]}) == {
        "input_ids": [4, 5, 7],
        "labels": [-100, 5, 7],
    }
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS[:3]]
    assert [loss.alone for loss in losses_of(tiny_llama(), rows)] == [None] * 3


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama(attention_dropout=0.5)
    before = picture(model)
    first = losses_of(model)
    assert differences(before, picture(model)) == [] and first == losses_of(model)


def full(model: Any, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Memory is out for batches of so many rows and more."""
    forward = model.model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) >= at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", run)


def test_less_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    expected = losses_of(copy.deepcopy(model))
    full(model, monkeypatch, at=3)
    for one, other in zip(losses_of(model), expected, strict=True):
        assert (one.loss, one.alone) == (pytest.approx(other.loss, rel=LOSS), pytest.approx(other.alone, rel=LOSS))


def test_a_row_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    full(model, monkeypatch, at=1)
    with pytest.raises(LoraDAError, match=r"out of memory with row \d+ alone, of \d+ tokens; free memory"):
        losses_of(model)


def test_a_loss_that_is_no_number_is_refused() -> None:
    model = tiny_llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(LoraDAError, match=r"the loss of row \d+ is not finite on this model; check its dtype"):
        losses_of(model)
