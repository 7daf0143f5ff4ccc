"""What a cell was made with, as its result has it."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from benchmarks.measure import environment


def environment_of(device: torch.device) -> dict[str, Any]:
    """Tell versions, hardware, command, commit and date."""
    made = environment(device)
    on = made["hardware"]
    gpu = f"{on['gpu']['name']}, " if on["gpu"] else ""
    return {
        "versions": made["versions"],
        "hardware": f"{gpu}{on['cpu']}, {on['threads']} of {on['logical_cores']} cores",
        "command": made["command"],
        "commit": _commit(),
        "date": made["date"],
    }


def _commit() -> str:
    git = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no git"
