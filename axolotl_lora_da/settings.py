"""The `lora_da:` block as the user wrote it, read before Axolotl drops in silence what its schema does not know."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lora_da.config import LoraDAConfig
from lora_da.errors import LoraDAError

BLOCK = "lora_da"

# Share of letters in common from which a key is taken for a slip of the block's name: with one letter missing, added,
# changed or two swapped it is 0.83 and more; for `lora_r`, `lora_alpha` and the bare `lora` it is 0.80 and less.
SLIP = 0.82

# In the type of an option that takes a number; elsewhere text that looks like one is text, such as a folder's name.
NUMBER = re.compile(r"\b(int|float)\b")


def read_settings(cfg: Mapping[str, Any]) -> LoraDAConfig:
    """The settings of a config, raw or validated.

    Raises:
        LoraDAError: the block's name or a key in it is misspelt, or a value is out of its range.
    """
    _check_block_name(cfg)
    block = cfg.get(BLOCK)
    if block is None:
        return LoraDAConfig()
    if not isinstance(block, Mapping):
        raise LoraDAError(f"{BLOCK} is {block!r} in the config; make it a block of options, such as `samples: 64`")
    options = [field.name for field in fields(LoraDAConfig)]
    for key in block:
        if key not in options:
            nearest = difflib.get_close_matches(str(key), options, n=1, cutoff=0.0)[0]
            raise LoraDAError(
                f"{BLOCK}.{key} is not an option of LoRA-DA; the nearest is {BLOCK}.{nearest}. "
                f"The options are {', '.join(options)}"
            )
    numbers = {field.name for field in fields(LoraDAConfig) if NUMBER.search(str(field.type))}
    return LoraDAConfig(**{key: _number(value) if key in numbers else value for key, value in block.items()})


def _check_block_name(cfg: Mapping[str, Any]) -> None:
    slips = [key for key in cfg if key != BLOCK and _looks_like_the_block(key)]
    if not slips:
        return
    from axolotl.integrations.config import merge_input_args  # builds the whole schema: only when there is doubt

    _, schema = merge_input_args()
    for key in slips:
        if key not in schema.model_fields:
            raise LoraDAError(
                f"{key} in the config is a key that neither Axolotl nor LoRA-DA knows; "
                f"for the options of LoRA-DA rename it to {BLOCK}"
            )


def _looks_like_the_block(key: Any) -> bool:
    letters = str(key).casefold().translate(str.maketrans("", "", "-_ ."))
    return letters.startswith("lorada") or difflib.SequenceMatcher(None, letters, "lorada").ratio() >= SLIP


def _number(value: Any) -> Any:
    """YAML reads 1e-6, without a dot, as text; Axolotl's own numbers allow it, so ours do."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value
