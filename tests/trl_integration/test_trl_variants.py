"""SFTTrainer's ways to lay out and mask rows, alone and together: the adapter is that of the PEFT call on the rows."""

import pytest
from datasets import Dataset
from models import documents
from settings import as_solved
from tolerances import REBATCHED

pytest.importorskip("trl", reason="TRL is not installed")

from trainers import base, by_hand, same_bits, worst_difference
from trl_rows import ALL, CONFIG, COUNT, SAMPLES, at_first_step, conversations, counted, counts
from trl_rows import prompts_and_completions as completions

PACKED = {"packing": True, "max_length": 64}
PADDING_FREE = {"padding_free": True, "max_length": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


def expected(folder, rows, config):
    return by_hand(base(folder), rows, config, bf16=False)


@pytest.mark.compat("completion-only", "trl-packing")
@pytest.mark.parametrize("packing", [PACKED, PADDING_FREE], ids=["packed", "padding-free"])
@pytest.mark.parametrize(
    ("data", "args"),
    [(completions, {"completion_only_loss": True}), (conversations, {"assistant_only_loss": True})],
    ids=["completion", "assistant"],
)
def test_masks_and_packing_together(folder, tmp_path, packing, data, args):
    texts, rows = data()
    report, adapter = at_first_step(folder, tmp_path, Dataset.from_list(texts), ALL, bf16=False, **packing, **args)
    assert counted(report) == counts(rows)
    assert (report.sample_unit, report.population_size) == ("document (from position_ids)", COUNT)
    assert worst_difference(adapter, expected(folder, rows, ALL)) < REBATCHED
    unmasked = expected(folder, [{**row, "labels": row["input_ids"]} for row in rows], ALL)
    assert worst_difference(adapter, unmasked) > 100 * REBATCHED


@pytest.mark.compat("trl-packing")
def test_bfd_split_packs_the_pieces_of_long_documents(folder, tmp_path):
    """It cuts what is longer than a row, where `bfd` drops the rest; a piece is a document of its own."""
    rows, width = documents(COUNT, longest=20), 8
    pieces = [
        {k: v[n : n + width] for k, v in row.items()} for row in rows for n in range(0, len(row["labels"]), width)
    ]
    kept = {"bfd": [{k: v[:width] for k, v in row.items()} for row in rows], "bfd_split": pieces}
    for strategy, documents_of in kept.items():
        config = as_solved(samples=1000)
        args = {"packing": True, "packing_strategy": strategy, "max_length": width, "bf16": False}
        report, adapter = at_first_step(folder, tmp_path, Dataset.from_list(rows), config, **args)
        assert counted(report) == counts(documents_of), strategy
        assert worst_difference(adapter, expected(folder, documents_of, config)) < REBATCHED


@pytest.mark.compat("sft")
@pytest.mark.filterwarnings("ignore:.*chunked_nll:FutureWarning")  # the newest TRL's other name of `nll`
@pytest.mark.filterwarnings("ignore:.*loss_type:FutureWarning")
@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_both_names_of_the_plain_loss(folder, tmp_path, loss_type):
    rows = documents(COUNT)
    report, adapter = at_first_step(folder, tmp_path, Dataset.from_list(rows), loss_type=loss_type, bf16=False)
    assert counted(report) == counts(rows[:SAMPLES])
    assert worst_difference(adapter, expected(folder, rows, CONFIG)) < REBATCHED


@pytest.mark.compat("trl-batches")
@pytest.mark.parametrize(
    ("args", "rows"),
    [
        ({"pad_to_multiple_of": 16}, documents(COUNT)),
        ({"max_length": 6}, [{k: v[:6] for k, v in row.items()} for row in documents(COUNT)]),
        ({"gradient_accumulation_steps": 2, "train_sampling_strategy": "group_by_length"}, documents(COUNT)),
    ],
    ids=["pad_to_multiple_of", "max_length", "group_by_length"],
)
def test_rows_in_other_batches(folder, tmp_path, args, rows):
    report, adapter = at_first_step(folder, tmp_path, Dataset.from_list(documents(COUNT)), bf16=False, **args)
    assert counted(report) == counts(rows[:SAMPLES])
    assert same_bits(adapter, expected(folder, rows, CONFIG))
