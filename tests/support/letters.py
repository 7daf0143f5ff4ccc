"""A task of letters, and a sweep over it that trains in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from words import WORDS

from benchmarks.quality.sweep import Sweep, read_sweep

LETTERS = WORDS[-7:]
CHOICES = ("c d", "c e")
TRAIN = [{"question": " ".join(LETTERS[n % 7 :] + LETTERS[: n // 7]), "answer": CHOICES[n % 2]} for n in range(40)]
TEST = [{"question": f"g g {' '.join(LETTERS[n:])}", "answer": CHOICES[n % 3 == 0]} for n in range(6)]
SWEEP = {
    "split": "development",
    "steps": 5,
    "batch": 2,
    "length": 20,
    "heldout_rows": 4,
    "curve_rows": 2,
    "base": "nf4",
    "tasks": {"letters": {"train": "train.jsonl", "test": "test.jsonl", "choices": list(CHOICES)}},
    "starts": {
        "plain": {"method": "plain"},
        "ours": {"method": "lora_da", "rates": [0.01]},
        "again": {"method": "plain", "rates": [0.01]},
    },
    "judged": ["ours"],
    "rates": [0.001, 0.01],
    "ranks": 2,
    "seeds": [3, 4],
    "init_samples": 4,
}


def sweep(folder: Path, **changes: object) -> Sweep:
    """Read the sweep, with changes, over the model and the files in a folder; without the keys that are None."""
    path = folder / "sweep.yml"
    content = {**SWEEP, "model": str(folder / "model"), **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DA_DATA", str(folder))
        return read_sweep(path)
