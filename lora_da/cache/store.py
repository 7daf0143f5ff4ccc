"""Solutions on disk, so that a second run of the same thing starts at once.

One safetensors file each, named by the key of what it was solved for. Nothing in a file is ever run or followed: it
holds tensors and JSON, and one that is not just what was stored counts for nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_da.adapter import AdapterLayer
from lora_da.errors import LoraDAError
from lora_da.model.sharding import shape
from lora_da.report import FirstStepReport, InitReport, LayerReport
from lora_da.solution import Solution

logger = logging.getLogger(__name__)

FACTORS = ("lora_A", "lora_B")


class CacheEntry:
    """The place of one solution.

    Args:
        folder: as `cache_folder` gives it.
        key: of what it is solved for, see `fingerprint`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / f"{key}.safetensors"
        self._key = key

    def load(self, layers: Sequence[AdapterLayer]) -> Solution | None:
        """The stored solution for these layers; None, with a warning, where the file is damaged or not ours."""
        try:
            tensors, metadata = self._read()
            return self._checked(tensors, metadata, layers)
        except FileNotFoundError:
            return None
        except (_UnusableFile, SafetensorError, OSError) as reason:
            logger.warning("LoRA-DA: %s is not used and will be written anew: %s", self.path, reason)
            return None

    def store(self, solution: Solution) -> None:
        """Put a solution there, all of it or nothing. A disk that does not take it costs a warning."""
        report = json.dumps(dataclasses.asdict(solution.report))  # NaN and infinities as Python writes and reads them
        tensors = {
            f"{layer}.{factor}": value.contiguous()
            for layer, pair in solution.factors.items()
            for factor, value in zip(FACTORS, pair, strict=True)
        }
        metadata = {"key": self._key, "report": report, "checksum": _checksum(self._key, report, tensors)}
        # Beside its place, so that the file is renamed and not copied; nobody else's, and read by nobody.
        unfinished = self.path.with_name(f".{self._key}-{uuid.uuid4().hex}")
        try:
            try:
                with open(unfinished, "xb") as file:
                    file.write(save(tensors, metadata))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, self.path)
            finally:  # an interrupt too
                unfinished.unlink(missing_ok=True)
        except OSError as reason:
            logger.warning("LoRA-DA: the solution is not kept for later runs: %s", reason)

    def _read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(self.path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118

    def _checked(
        self, tensors: dict[str, Tensor], metadata: dict[str, str], layers: Sequence[AdapterLayer]
    ) -> Solution:
        if not {"key", "report", "checksum"} <= set(metadata):
            raise _UnusableFile("it was not written by LoRA-DA")
        if metadata["key"] != self._key:
            raise _UnusableFile("it was written for something else")
        if metadata["checksum"] != _checksum(self._key, metadata["report"], tensors):
            raise _UnusableFile("its content was changed")
        report = _report(metadata["report"])
        names = [layer.name for layer in layers if layer.name not in report.failed and layer.name not in report.left]
        expected = {
            f"{layer.name}.{factor}": getattr(layer, factor)
            for layer in layers
            if layer.name in names
            for factor in FACTORS
        }
        if {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} != {
            n: (shape(t), t.dtype) for n, t in expected.items()
        }:
            raise _UnusableFile("its factors are not those of the adapter's layers")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise _UnusableFile("its factors are not finite")
        factors = {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names}
        return Solution(factors, dataclasses.replace(report, from_cache=True))


def cache_folder(path: str | None) -> Path | None:
    """The folder of a `cache_dir`, made if it is not there; None without one.

    Raises:
        LoraDAError: it is no folder and cannot be made one.
    """
    if path is None:
        return None
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoraDAError(f"lora_da.cache_dir is {path!r}, which cannot be used as a folder: {error}") from error
    return folder


class _UnusableFile(ValueError):
    """A file that is not what was stored; the message says why."""


def _report(text: str) -> InitReport:
    try:
        fields = json.loads(text)
        layers = {name: LayerReport(**layer) for name, layer in fields.pop("layers").items()}
        first_step = fields.pop("first_step")
        if first_step is not None:
            first_step = FirstStepReport(**first_step | {"tried": [tuple(pair) for pair in first_step["tried"]]})
        norms = [(row, norm) for row, norm in fields.pop("gradient_norms")]
        return InitReport(**fields, layers=layers, first_step=first_step, gradient_norms=norms)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _UnusableFile(f"its report cannot be read: {error}") from error


def _checksum(key: str, report: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all there is in a file."""
    content = hashlib.sha256()
    for text in (key, report, *(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in sorted(tensors.items()))):
        content.update(f"{len(text)} {text}".encode())
    for _, tensor in sorted(tensors.items()):
        content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
