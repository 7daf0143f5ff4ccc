"""What Axolotl trains beside language models: reward models on pairs, and models that read images."""

from __future__ import annotations

import json

import pytest
from tolerances import REBATCHED

pytest.importorskip("axolotl", reason="Axolotl is not installed")

import classifiers
import image_chats
import image_models
import rewards
import torch
from axolotl_runs import SAMPLES, STARTED, Project, difference
from models import IGNORED, WIDE, adapter_weights
from settings import as_solved
from torch.utils.data import DataLoader
from trainers import sentences, tokenizer
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification

from lora_da import initialize_lora_da_weights
from lora_da.tasks import RewardLoss

pytestmark = [pytest.mark.axolotl, pytest.mark.slow, pytest.mark.filterwarnings("default")]


def initialized(model, rows, collate, **options):
    """The adapter that the PEFT call gives, under the names of a saved one."""
    loader = DataLoader(rows, 4, collate_fn=collate)
    initialize_lora_da_weights(model, loader, as_solved(samples=SAMPLES), show_progress=False, **options)
    return {name.replace(".default", ""): value for name, value in adapter_weights(model).items()}


@pytest.mark.compat("axolotl-reward")
def test_a_reward_model(tmp_path):
    project = Project(tmp_path, rewards.reward_model(**WIDE))
    texts = [" ".join(words) for words in sentences(3 * 20)]
    pairs = [dict(zip(("input", "chosen", "rejected"), texts[n : n + 3], strict=True)) for n in range(0, 60, 3)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"system": "w1 w2", **pair}) + "\n" for pair in pairs))
    run = project.run(
        "reward",
        reward_model=True,
        chat_template="tokenizer_default",
        datasets=[{"path": str(file), "ds_type": "json", "type": "bradley_terry.chat_template"}],
        pad_to_sequence_len=False,
        remove_unused_columns=False,
        lora_target_linear=None,
        lora_target_modules=["q_proj", "v_proj", "down_proj"],
    )
    assert run.lines() == [STARTED.replace("14 of 14", "12 of 12")] and run.steps == 1
    assert run.report["samples"] == SAMPLES and run.report["population_size"] == len(pairs)

    def ids(pair, answer):
        turns = {"system": "w1 w2", "user": pair["input"], "assistant": pair[answer]}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        return torch.tensor(tokenizer().apply_chat_template(messages, return_dict=True)["input_ids"])

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, dtype=torch.float32)
    rows = [{answer: ids(pair, answer) for answer in ("chosen", "rejected")} for pair in pairs]
    model = classifiers.adapted(base, target_modules=["q_proj", "v_proj", "down_proj"])
    hand = initialized(model, rows, rewards.pad, reward=RewardLoss(None))
    assert difference(run.adapter(), hand) < REBATCHED


@pytest.mark.compat("axolotl-images")
@pytest.mark.parametrize("some_without", [False, True])
def test_images(tmp_path, some_without):
    reader = image_chats.processor()
    project = Project(tmp_path, image_models.reader("Llava"), reader)
    rows = image_chats.chats(20)
    for row in rows[::3] if some_without else []:
        row["images"], row["messages"][0]["content"] = [], row["messages"][0]["content"][1:]
    run = project.run(
        "images",
        processor_type="AutoProcessor",
        chat_template="tokenizer_default",
        datasets=[{"path": str(image_chats.write(rows, tmp_path)), "ds_type": "json", "type": "chat_template"}],
        skip_prepare_dataset=True,
        remove_unused_columns=False,
        lora_target_linear=None,
        lora_target_modules=image_models.LANGUAGE,
    )
    assert run.lines() == [STARTED.replace("14 of 14", "28 of 28")] and run.steps == 1

    def made(row):
        messages = [{**m, "content": list(m["content"])} for m in row["messages"]]
        text = reader.apply_chat_template(messages, tokenize=False)
        return reader(text=[text], images=row["images"] or None, return_tensors="pt")

    units = []
    for row in rows:
        inputs = dict(made(row))
        ids = inputs.pop("input_ids")[0]
        labels = ids.masked_fill(ids == image_models.IMAGE, IGNORED)  # Axolotl trains on all but the images' tokens
        units.append({"input_ids": ids, "labels": labels, **inputs})
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    hand = initialized(image_models.adapted(base), units, image_models.pad)
    assert difference(run.adapter(), hand) < REBATCHED
