"""How many documents are taken: so many, or as many as hold so many tokens."""

from __future__ import annotations

from typing import Any

import pytest
from models import batches, documents, packed, pad, tiny_llama, with_lora
from torch.utils.data import DataLoader

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.config import SAMPLES, TOKENS
from lora_da.samples.draw import InitData, Size, draw, read_causal

LENGTHS = (10, 20, 30, 40, 50, 60)


def loader(lengths: Any = LENGTHS) -> DataLoader[Any]:
    return DataLoader(documents(lengths), 2, collate_fn=pad)


def taken(data: Any, samples: int, tokens: int | None, others: int = 0) -> InitData:
    return draw(data, Size(samples, tokens, others), None, None, read_causal, True)


DATA = {
    "rows": loader,
    "packed": lambda: DataLoader([packed(documents(LENGTHS[n : n + 3])) for n in (0, 3)], 1, collate_fn=lambda x: x[0]),
    "ready batches": lambda: batches(documents(LENGTHS), 4),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    ("samples", "tokens", "expected"),
    [(4, None, 4), (4, 1000, 4), (6, 100, 4), (6, 99, 3), (6, 60, 3), (2, 60, 2), (6, 1, 1), (6, 210, 6)],
)
def test_as_many_as_hold_the_tokens_and_one_at_least(
    data: str, samples: int, tokens: int | None, expected: int
) -> None:
    found = taken(DATA[data](), samples, tokens)
    assert (found.n_samples, found.n_tokens) == (expected, sum(LENGTHS[:expected]))
    assert found.population_size == len(LENGTHS)


@pytest.mark.parametrize(("tokens", "others"), [(200, 2), (1000, 4), (4, 1)])
def test_the_documents_beside_them_hold_a_quarter(tokens: int, others: int) -> None:
    """Here each document has 20 tokens, and four are asked for."""
    found = taken(loader([20] * 30), 5, tokens, others=4)
    assert sum(batch.tokens.n_documents for batch in found.others) == others
    assert found.n_samples == (5 if tokens > 4 else 1)


def test_the_mean_row_is_what_a_step_reads() -> None:
    assert taken(loader(), 6, None).row_tokens == sum(LENGTHS) / 6
    assert taken(DATA["packed"](), 6, None).row_tokens == sum(LENGTHS) / 2


def test_by_default_long_documents_are_fewer() -> None:
    rows = [{"input_ids": [5, 6] * (TOKENS // 8), "labels": [5, 6] * (TOKENS // 8)}] * 12
    reads = taken(DataLoader(rows, 1, collate_fn=pad), *LoraDAConfig().size())
    assert reads.n_samples == 4 and reads.n_tokens == TOKENS
    reads = taken(loader([8] * (SAMPLES + 5)), *LoraDAConfig().size())
    assert reads.n_samples == SAMPLES
    assert LoraDAConfig(samples=1000).size() == (1000, None)


def test_the_line_says_how_many_training_steps_it_took() -> None:
    """By the time that a token took; outside a trainer nobody knows what a step is."""
    config = LoraDAConfig(samples=6)
    report = initialize_lora_da_weights(with_lora(tiny_llama()), loader(), config, show_progress=False)
    assert report.steps is None and "training steps" not in report.line()
    report = initialize_lora_da_weights(with_lora(tiny_llama()), loader(), config, show_progress=False, step_rows=4)
    passes = sum(report.timings[part] for part in ("forward", "head", "backward"))
    rows = report.samples
    assert report.steps == pytest.approx(report.seconds / (passes / rows * 4))
    assert f" s ({report.steps:.1f} training steps), " in report.line()
    config = LoraDAConfig(method="cntlora", samples=6)
    report = initialize_lora_da_weights(with_lora(tiny_llama()), loader(), config, show_progress=False, step_rows=4)
    assert report.steps is None
