"""Which tokens of TRL's datasets count: masks, padding, packed rows and streams."""

import pytest
from datasets import Dataset
from models import IGNORED, documents
from tolerances import REBATCHED

pytest.importorskip("trl", reason="TRL is not installed")

from settings import as_solved
from trainers import FirstStep, base, by_hand, same_bits, sentences, sft, worst_difference
from trl_rows import (
    ALL,
    CONFIG,
    COUNT,
    SAMPLES,
    at_first_step,
    conversations,
    counted,
    counts,
    ids,
    prompts_and_completions,
)

from lora_da import LoraDAConfig
from lora_da.errors import LoraDAError
from trl_integration import LoraDAInitializer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.mark.compat("completion-only")
@pytest.mark.parametrize(
    ("data", "args"),
    [(prompts_and_completions, {}), (conversations, {"assistant_only_loss": True})],
    ids=["completion", "assistant"],
)
def test_loss_is_taken_where_the_data_say(folder, tmp_path, data, args):
    texts, rows = data()
    report, adapter = at_first_step(folder, tmp_path, Dataset.from_list(texts), **args)
    assert counted(report) == counts(rows[:SAMPLES])
    assert (report.sample_unit, report.population_size) == ("row", COUNT)
    assert same_bits(adapter, by_hand(base(folder), rows, CONFIG))

    unmasked = [{**row, "labels": row["input_ids"]} for row in rows]
    report, other = at_first_step(folder, tmp_path, Dataset.from_list(texts), completion_only_loss=False)
    assert counted(report) == counts(unmasked[:SAMPLES])
    assert same_bits(other, by_hand(base(folder), unmasked, CONFIG))
    assert not same_bits(adapter, other)


def test_what_padding_holds_changes_nothing(folder, tmp_path):
    rows, adapters = Dataset.from_list(documents(COUNT)), []
    for token in (0, 77):
        first = FirstStep()
        trainer = sft(base(folder), rows, tmp_path, LoraDAInitializer(CONFIG), first)
        trainer.data_collator.pad_token_id = token
        trainer.train()
        adapters.append(first.adapter)
    assert same_bits(*adapters)


@pytest.mark.compat("trl-packing")
@pytest.mark.parametrize(
    "packing",
    [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}],
    ids=["packed", "padding-free"],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sample_of_packed_rows_is_a_document(folder, tmp_path, packing, attention):
    rows = documents(COUNT)
    initializer, first = LoraDAInitializer(ALL), FirstStep()
    model = base(folder, attn_implementation=attention)
    sft(model, Dataset.from_list(rows), tmp_path, initializer, first, bf16=False, **packing).train()
    assert counted(initializer.report) == counts(rows)
    assert initializer.report.sample_unit == "document (from position_ids)"
    assert initializer.report.population_size == COUNT

    alone = by_hand(base(folder, attn_implementation=attention), rows, ALL, bf16=False)
    assert worst_difference(first.adapter, alone) < REBATCHED
    joined = [{key: [i for row in rows[n : n + 4] for i in row[key]] for key in rows[0]} for n in range(0, COUNT, 4)]
    leaking = by_hand(base(folder, attn_implementation=attention), joined, ALL, bf16=False)
    assert worst_difference(leaking, alone) > 100 * REBATCHED


def test_a_document_without_loss_changes_nothing_in_its_row(folder, tmp_path):
    rows = documents(COUNT)
    silent = [{**row, "labels": [IGNORED] * len(row["labels"])} if n % 3 == 0 else row for n, row in enumerate(rows)]
    others = [
        {**row, "input_ids": [i ^ 1 for i in row["input_ids"]]} if n % 3 == 0 else row for n, row in enumerate(silent)
    ]
    packing = {"packing": True, "max_length": 32, "bf16": False}
    report, adapter = at_first_step(folder, tmp_path, Dataset.from_list(silent), ALL, **packing)
    assert counted(report) == counts(silent)
    assert counts(silent) < counts(rows)
    changed = at_first_step(folder, tmp_path, Dataset.from_list(others), ALL, **packing)[1]
    assert worst_difference(changed, adapter) < REBATCHED
    spoken = at_first_step(folder, tmp_path, Dataset.from_list(rows), ALL, **packing)[1]
    assert worst_difference(spoken, adapter) > 100 * REBATCHED


def test_rows_of_wrapped_packing_are_samples(folder, tmp_path):
    """Its rows are cut anywhere and nothing tells the documents in them apart: TRL trains on them as one text."""
    texts = Dataset.from_list([{"text": " ".join(words)} for words in sentences(40, longest=20)])
    args = {"packing": True, "packing_strategy": "wrapped", "max_length": 32}
    report, adapter = at_first_step(folder, tmp_path, texts, **args)
    stream = [i for words in sentences(40, longest=20) for i in ids([*words, "<eos>"])]
    rows = [{"input_ids": stream[n : n + 32], "labels": stream[n : n + 32]} for n in range(0, len(stream), 32)]
    assert counted(report) == counts(rows[:SAMPLES])
    assert (report.sample_unit, report.population_size) == ("row", len(rows))
    assert same_bits(adapter, by_hand(base(folder), rows, CONFIG))


@pytest.mark.compat("streams")
def test_a_stream_needs_its_length(folder, tmp_path):
    rows = Dataset.from_list(documents(COUNT))
    first = FirstStep()
    trainer = sft(base(folder), rows.to_iterable_dataset(), tmp_path, LoraDAInitializer(CONFIG), first)
    with pytest.raises(LoraDAError, match="the dataset has no length.*set `population_size`"):
        trainer.train()
    assert not first.adapter

    config = as_solved(samples=SAMPLES, population_size=1000)
    report, adapter = at_first_step(folder, tmp_path, rows.to_iterable_dataset(), config)
    assert report.population_size == 1000
    assert counted(report) == counts(documents(COUNT)[:SAMPLES])
    assert same_bits(adapter, by_hand(base(folder), rows, config))
    with pytest.raises(LoraDAError, match="`seed: 3` asks for random samples"):
        at_first_step(folder, tmp_path, rows.to_iterable_dataset(), LoraDAConfig(seed=3, population_size=1000))


@pytest.mark.parametrize("labels", ["none", "all masked"])
def test_data_without_loss_are_refused(folder, tmp_path, labels):
    rows = [{**row, "labels": [IGNORED] * len(row["labels"])} for row in documents(COUNT)]
    first = FirstStep()
    trainer = sft(base(folder), Dataset.from_list(documents(COUNT)), tmp_path, LoraDAInitializer(), first)
    trainer.train_dataset = Dataset.from_list(rows)
    if labels == "none":
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "labels"}
    with pytest.raises(LoraDAError, match="all labels are -100" if labels == "all masked" else "have no `labels`"):
        trainer.train()
    assert not first.adapter
