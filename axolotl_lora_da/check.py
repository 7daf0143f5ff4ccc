"""The data of an Axolotl config, prepared and loaded as for training, and looked at."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from axolotl.loaders import ModelLoader, load_tokenizer

from axolotl_lora_da.kernels import lifted_lora_kernels
from lora_da.doctor.check import check, check_and_save, ends_of
from lora_da.errors import LoraDAError
from lora_da.findings import DataReport

# A set key on the left makes rows of another kind than token ids with labels.
REFUSED = {
    "rl": "rows of preferences or prompts",
    "reward_model": "rows in pairs",
    "process_reward_model": "rows of steps",
    "processor_type": "rows with images or sound",
    "pretraining_dataset": "a stream that has no end",
    "streaming": "a stream that has no end",
}


def check_config(config: Path, output: Path | None) -> list[str]:
    """Look at all rows of a config's datasets; see `lora_da.doctor.check.check_and_save`.

    Args:
        config: the YAML file.
        output: folder for what is written; the config's `output_dir` if None.

    Raises:
        LoraDAError: Axolotl refuses the config, or it is of a kind that is not looked at.
    """
    try:
        cfg = load_cfg(str(config))
    except (OSError, ValueError) as error:
        raise LoraDAError(f"{config}: {error}") from error
    for key, kind in REFUSED.items():
        if cfg.get(key):
            raise LoraDAError(f"{key} is set in {config}, so there are {kind}, which are not checked; unset it")
    cfg.sample_packing = False  # documents are looked at, not what they are packed into
    with _dropped() as dropped:
        try:
            rows = (PluginManager.get_instance().load_datasets(cfg) or load_datasets(cfg=cfg)).train_dataset
        except (OSError, ValueError) as error:
            raise LoraDAError(f"{config}: Axolotl cannot prepare the rows: {error}") from error
    tokenizer = load_tokenizer(cfg)
    loaded, _ = ModelLoader(cfg, tokenizer).load()
    model = loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded
    look = partial(check, model, rows, cfg.sequence_len, ends_of(tokenizer, model), tokenizer.decode)

    def checked() -> DataReport:
        with lifted_lora_kernels(model):
            return dataclasses.replace(look(), notes=dropped)

    return check_and_save(checked, output or Path(cfg.output_dir), model.device)


@contextlib.contextmanager
def _dropped() -> Iterator[list[str]]:
    """What Axolotl says of rows that it drops itself, which nobody sees afterwards."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("Dropped "):
                said.append(f"Axolotl, before that: {message}")

    handler, logger = Listening(), logging.getLogger("axolotl")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
