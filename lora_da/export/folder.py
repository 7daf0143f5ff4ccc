"""The initial adapter as a folder that any trainer can start from: an ordinary PEFT adapter, and the report."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from lora_da.config import LoraDAConfig
from lora_da.errors import LoraDAError
from lora_da.initialize import initialize_lora_da_weights
from lora_da.processes import Processes
from lora_da.report import InitReport
from lora_da.tasks import RewardLoss


def export_initial_adapter(
    peft_model: PeftModel,
    dataloader: Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    config: LoraDAConfig | None = None,
    adapter_name: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    reward: RewardLoss | None = None,
    learning_rate: float | None = None,
) -> InitReport:
    """Initialise an adapter and save it as `PeftModel.save_pretrained` does, with `lora_da_report.json` beside it.

    Args:
        peft_model, dataloader, config, adapter_name, show_progress, reward, learning_rate: see
            `initialize_lora_da_weights`.
        output: the folder; an adapter that is not called `default` is in a folder of its name in there, as PEFT has it.
        overwrite: put the files into a folder that holds others; those of the same name are replaced.

    Returns:
        The report of the initialisation.

    Raises:
        LoraDAError: as `initialize_lora_da_weights`; the folder is not empty or cannot be made; the adapter carries
            trained weights. Nothing was saved then.
    """
    if Processes().size > 1:
        raise LoraDAError("an adapter is exported by one process: start this one without a launcher of several")
    with _complete_folder(Path(output).expanduser().resolve(), overwrite) as folder:
        report = initialize_lora_da_weights(
            peft_model, dataloader, config, adapter_name, show_progress, reward, learning_rate=learning_rate
        )
        if report.skipped is not None:
            raise LoraDAError(f"there is no initial adapter to export: {report.skipped}; add a fresh one")
        names = [adapter_name or str(peft_model.active_adapters[0])]
        peft_model.save_pretrained(str(folder), selected_adapters=names)
        report.save(folder)
    return report


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written to.

    Raises:
        LoraDAError: it is a file, or holds files and `overwrite` is not set.
    """
    if folder.is_dir():
        if any(folder.iterdir()) and not overwrite:
            raise LoraDAError(
                f"the output folder {folder} is not empty; choose another one, or set overwrite (--overwrite)"
            )
    elif folder.exists():
        raise LoraDAError(f"the output folder {folder} is a file; choose another one")


@contextlib.contextmanager
def _complete_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to save to, which takes the other's place when all is in it, and is gone after an error."""
    check_output(folder, overwrite)
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise LoraDAError(f"the output folder {folder} cannot be made: {error}") from error
    try:
        yield unfinished
        if folder.is_dir() and any(folder.iterdir()):
            _move_files(unfinished, folder)
        else:
            os.replace(unfinished, folder)  # an empty folder of that name gives way
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    """One by one, so that what else is in the target stays."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
