"""Chats about pictures, and a processor that makes a tiny LLaVA's inputs of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from image_models import IMAGE
from PIL import Image
from trainers import NUMBERED, SPECIAL
from transformers import LlavaProcessor
from words import word_tokenizer

WORDS = [*SPECIAL, *NUMBERED]
WORDS[IMAGE] = "<image>"
TEXTS = NUMBERED[:-2]  # what a person writes
# Without torchvision there is one that needs Pillow alone, and its name has changed.
_IMAGES = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% if m['content'] is string %}{{ m['content'] + ' ' }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}{{ '<eos> ' }}{% endif %}{% endfor %}"
)


def processor() -> LlavaProcessor:
    """What goes with `image_models.reader("Llava")`: an image is four tokens."""
    tokenizer = word_tokenizer(WORDS, TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        image_processor=_IMAGES(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,  # the tower's own, which is left out
        chat_template=TEMPLATE,
    )


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Small ones of random colours."""
    chance = random.Random(seed)
    colours = [tuple(chance.randrange(256) for _ in range(3)) for _ in range(12 * count)]
    found = []
    for number in range(count):
        picture = Image.new("RGB", (4, 3))
        picture.putdata(colours[12 * number : 12 * (number + 1)])
        found.append(picture.resize((16, 12)))
    return found


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A picture, a question of some words and an answer of others."""
    chance = random.Random(seed)

    def text() -> dict[str, str]:
        return {"type": "text", "text": " ".join(chance.choices(TEXTS, k=chance.randint(2, 7)))}

    return [
        {
            "images": [picture],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, text()]},
                {"role": "assistant", "content": [text()]},
            ],
        }
        for picture in pictures(count, seed)
    ]


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write chats as Axolotl reads them: each picture is a file whose path stands in its message."""
    lines = []
    for number, row in enumerate(rows):
        path = folder / f"{number}.png"
        for picture in row["images"]:
            picture.save(path)
        user, assistant = row["messages"]
        asked = [{"type": "image", "path": str(path)} if p["type"] == "image" else p for p in user["content"]]
        lines.append(json.dumps({"messages": [{**user, "content": asked}, assistant]}))
    file = folder / "chats.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
