"""How an adapter starts: plain, by a method of this project's, or by PEFT's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader

from benchmarks.errors import BenchmarkError
from benchmarks.quality.analysis import PLAIN
from benchmarks.quality.candidates import CANDIDATES
from benchmarks.quality.corpora import DIGEST
from benchmarks.quality.results import Cell
from lora_da import InitReport, LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import Adapter, find_adapter
from lora_da.config import METHODS, PRESETS
from lora_da.methods.method import Method

CONTROLS = ("zero_B", "half_B", "random_A", "plain_scale")
A_TIMES, FROZEN_A, UNCLIPPED = "A_times", "frozen_A", "unclipped"
PLAINS_SETTINGS = (A_TIMES, FROZEN_A, UNCLIPPED)  # all that plain LoRA has
OWN_SETTINGS = ("control", "candidate", *PLAINS_SETTINGS)  # of a start, beside those of `LoraDAConfig`


def config_of(method: str, settings: Mapping[str, Any]) -> LoraDAConfig:
    """Resolve the settings of a start; the samples are the cell's.

    Args:
        settings: of `LoraDAConfig`, where `preset` may be a mapping, `base` and what is changed of it, and
            `OWN_SETTINGS`.
    """
    own = {"method": method, **{name: value for name, value in settings.items() if name not in OWN_SETTINGS}}
    if isinstance(own.get("preset"), Mapping):
        changes = dict(own["preset"])
        own["preset"] = replace(PRESETS[changes.pop("base")], **changes)
    return LoraDAConfig(**own)


def digest(method: str, settings: Mapping[str, Any]) -> str:
    """Digest what a start of this project's resolves to: a changed default is another start. Empty for others.

    Raises:
        BenchmarkError: a start that is not this project's has settings that nothing reads.
    """
    if method not in METHODS:
        unknown = set(settings) - (set(PLAINS_SETTINGS) if method == PLAIN else set())
        if unknown:
            raise BenchmarkError(f"{method} has no setting {', '.join(map(repr, sorted(unknown)))}")
        return ""
    resolved = config_of(method, settings).settings()
    resolved["samples"] = 256  # the cell's count; in the results on file this stands in its place
    if resolved["first_step"] in (None, "gamma"):  # younger than the first results on file, which had no other
        del resolved["first_step"]
    if resolved["chosen_rows"] in (None, 1):  # likewise
        del resolved["chosen_rows"]
    if not resolved["match_rate"]:  # likewise
        del resolved["match_rate"]
    found = json.dumps(resolved, sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:DIGEST]


def matches_rate(cell: Cell) -> bool:
    """Whether the start depends on the learning rate."""
    return cell.method in METHODS and bool(config_of(cell.method, cell.settings).numbers().match_rate)


def ours(model: PeftModel, loader: DataLoader[Any], cell: Cell, cache: Path | None) -> InitReport:
    """Start by a method of this project's.

    Args:
        loader: of all training rows; the first of them are looked at.
        cell: with the settings of `config_of`.
        cache: a folder for solutions, so that the rates of a sweep share one.
    """
    kind, candidate = (cell.settings.get(name) for name in ("control", "candidate"))
    config = replace(
        config_of(cell.method, cell.settings),
        samples=cell.init_samples,
        cache_dir=None if cache is None or candidate else str(cache),  # a candidate may have changed under its name
    )
    if candidate is not None:
        config = replace(config, method=candidate_of(candidate))
    report = initialize_lora_da_weights(model, loader, config, show_progress=False, learning_rate=cell.rate or None)
    if kind is not None:
        control(model, kind, cell.seed)
    return report


@torch.no_grad()
def scale_A(model: PeftModel, times: float) -> None:
    """Multiply every lora_A and divide lora_B by as much: that changes what a learning rate does, and nothing else."""
    adapter = find_adapter(model)
    factors = {layer.name: layer.factors() for layer in adapter.layers}
    adapter.write({name: (lora_A * times, lora_B / times) for name, (lora_A, lora_B) in factors.items()})


def freeze_A(model: PeftModel) -> None:
    """Train lora_B alone."""
    for layer in find_adapter(model).layers:
        lora_A, *_ = layer.parameters
        lora_A.requires_grad_(False)


def candidate_of(name: str) -> Method:
    """What is tried in the place of LoRA-DA's solution.

    Raises:
        BenchmarkError: there is no such candidate.
    """
    if name not in CANDIDATES:
        raise BenchmarkError(f"candidate is {name!r}; set one of {', '.join(CANDIDATES)}")
    return CANDIDATES[name]


@torch.no_grad()
def control(model: PeftModel, kind: str, seed: int) -> None:
    """Change a start so that it tells what of it matters.

    Args:
        kind: `zero_B`, the chosen A alone; `half_B`, half the way along the first step; `random_A`, a random A of each
            chosen A's norm, and no B; `plain_scale`, the chosen A with the norm that plain LoRA's is expected to have,
            and no B.
        seed: of the random A.

    Raises:
        BenchmarkError: there is no such control.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = find_adapter(model)
    factors = {}
    for layer in adapter.layers:
        a, b = layer.factors()
        if kind == "random_A":
            noise = torch.randn(a.shape, generator=generator).to(a)
            a = noise * (a.norm() / noise.norm())
        elif kind == "plain_scale":
            a = a * ((layer.plain_variance * a.numel()) ** 0.5 / a.norm())
        elif kind not in ("zero_B", "half_B"):
            raise BenchmarkError(f"control is {kind!r}; set one of {', '.join(CONTROLS)}")
        factors[layer.name] = (a, b / 2 if kind == "half_B" else torch.zeros_like(b))
    Adapter(adapter.name, adapter.layers, {}).write(factors)
