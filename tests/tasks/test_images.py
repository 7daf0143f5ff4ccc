"""Models that read images: the language layers are served with what the frozen tower makes of the images."""

from __future__ import annotations

import pytest
import torch
from collecting import worst
from dequantized import dequantized, four_bit
from image_models import IMAGE, KINDS, adapted, in_batches, losses, pad, reader, rows
from models import IGNORED, PREFIX, WIDE
from peft import PeftModel
from picture import differences, picture
from planning import ONE, WAYS, collected_by, surveyed_model
from settings import as_solved
from task_oracle import statistics_of
from tolerances import FLOAT32
from torch.utils.data import DataLoader

from lora_da import LoraDAConfig, LoraDAError, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.tasks import find_task


def targets(model: PeftModel) -> list[str]:
    return [layer.name.removeprefix(PREFIX) for layer in find_adapter(model).layers]


def check(kind, found, batches, way=ONE, averaging="tokens"):
    model = adapted(reader(kind))
    ours = collected_by(model, batches, way, averaging)
    oracle = statistics_of(reader(kind), found, losses, targets(model), averaging)
    assert {name: s.n_tokens for name, s in ours.items()} == {name: s.n_tokens for name, s in oracle.items()}
    assert worst(ours, oracle) < FLOAT32


@pytest.mark.compat("vision-language")
@pytest.mark.parametrize("averaging", ["samples", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_autograd(kind, averaging):
    found = rows(kind)
    check(kind, found, in_batches(found, 3), averaging=averaging)


@pytest.mark.compat("vision-language")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_running(kind, way):
    found = rows(kind)
    check(kind, found, in_batches(found, 3), WAYS[way])


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_are_seen(kind):
    """Other images, other statistics."""
    found, model = rows(kind), adapted(reader(kind))
    ours = collected_by(model, in_batches(found, 3))
    blank = [{k: v * 0 if k == "pixel_values" else v for k, v in row.items()} for row in found]
    assert worst(ours, collected_by(model, in_batches(blank, 3))) > 100 * FLOAT32


@pytest.mark.parametrize(("size", "extra"), [(1, 0), (7, 0), (4, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_padding_change_nothing(kind, size, extra):
    found = rows(kind)
    check(kind, found, in_batches(found, size, extra), averaging="samples")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_dataloader_are_batched_by_length(kind):
    found = rows(kind, 12)
    check(kind, found, DataLoader(found, 1, collate_fn=pad))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_with_images_are_neither_cut_nor_halved(kind):
    """Also where the images are of the shape of the tokens."""
    found = rows(kind, 4)
    task = find_task(reader(kind))
    batch = task.read(pad(found, 3), 100)
    assert batch.trimmed() is batch and batch.halves() is None and batch.glimpse() is batch
    tokens = pad(found, 3)["input_ids"]
    alike = {"input_ids": tokens, "labels": tokens, "pixel_values": tokens.float()}
    assert task.read(alike, 100).halves() is None
    without = {k: v for k, v in alike.items() if k != "pixel_values"}
    assert task.read(without, 100).halves() is not None


def test_positions_of_three_axes_are_not_cut():
    """(3, rows, columns), as M-RoPE's are when a collator makes them."""
    model, found = reader("Qwen2VL").eval(), rows("Qwen2VL", 4)
    batch = pad(found)
    names = ("image_grid_thw", "attention_mask", "mm_token_type_ids")
    positions, _ = model.model.get_rope_index(batch["input_ids"], **{name: batch[name] for name in names})
    assert positions.shape == (3, *batch["input_ids"].shape)
    check("Qwen2VL", found, [{**batch, "position_ids": positions}])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_changes(kind):
    """What the first forward of all notes in the model is transformers' own, and stays as that left it."""
    model, batches = adapted(reader(kind)), in_batches(rows(kind), 3)
    with torch.no_grad():
        model(**batches[0])
    before = picture(model)
    report = initialize_lora_da_weights(model, batches, as_solved(), show_progress=False)
    assert report.initialized == report.targeted == 28 and report.samples == 7
    changed = differences(before, picture(model))
    assert len(changed) == 2 * report.initialized and all("lora_" in c and ": bits" in c for c in changed), changed


def test_a_vision_layer_keeps_pefts_init(caplog):
    """One in 29: it is named, and the others are served, though its positions are as many as the tokens."""
    vision = r"|.*vision_tower.*layers\.0\.mlp\.fc1"
    model = adapted(reader("Llava"), r"(.*language_model\..*_proj" + vision + ")")
    name = next(path for path in targets(model) if "vision" in path)
    ids = torch.tensor([[5, *[IMAGE] * 8, 6]])
    labels = torch.where(ids == 6, ids, IGNORED)
    batch = {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(2, 3, 8, 8)}
    assert ids.numel() == 2 * 5  # positions of an image in the tower
    report = initialize_lora_da_weights(model, [batch], show_progress=False)
    assert list(report.failed) == [f"{PREFIX}{name}"] and report.initialized == 28
    assert "a vision layer?" in report.failed[f"{PREFIX}{name}"]


@pytest.mark.refused("vision-tower")
def test_a_tower_that_is_targeted_is_an_error():
    model = adapted(reader("Llava"), r".*(language_model\..*_proj|vision_tower.*layers\.0\..*(_proj|fc\d))")
    with pytest.raises(LoraDAError, match=r"6 of 34 layers have no solution; .*vision_tower.*take such layers out of"):
        initialize_lora_da_weights(model, in_batches(rows("Llava"), 3), show_progress=False)


def test_four_bit_equals_its_dequantised_twin(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = four_bit(reader("Llava", **WIDE), tmp_path)
    twin = dequantized(base, reader("Llava", **WIDE))
    model, found = adapted(base), rows("Llava")
    oracle = statistics_of(twin, found, losses, targets(model), "tokens")
    assert worst(collected_by(model, in_batches(found, 3)), oracle) < FLOAT32


def test_a_small_budget_streams():
    model, batches = adapted(reader("Llava")), in_batches(rows("Llava"), 3)
    assert surveyed_model(model, batches).sequence is not None
    report = initialize_lora_da_weights(model, batches, LoraDAConfig(memory_budget=5e-4), show_progress=False)
    assert report.plan.startswith("streamed: ") and report.initialized == report.targeted
