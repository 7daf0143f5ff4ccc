"""`torch.set_default_device` in the user's process changes nothing here: every tensor is made where it belongs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import fake_gpus
from models import Document, adapter_weights, documents, pad, tiny_llama, with_lora
from settings import as_solved
from torch.utils.data import DataLoader

from lora_da import initialize_lora_da_weights

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
MAKERS = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
MAKERS |= {"tensor", "zeros", "Generator"}


def homeless(source: str) -> list[str]:
    """Calls that make a tensor or a generator without saying where."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func).removeprefix("torch.") in MAKERS]
    made = [call for call in made if ast.unparse(call.func).startswith("torch.")]
    return [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in made
        if not any(word.arg == "device" for word in call.keywords)
        and not (ast.unparse(call.func) == "torch.Generator" and call.args)
    ]


def test_every_tensor_is_made_somewhere() -> None:
    assert homeless(
        "torch.zeros(3)\ntorch.ones(2, device=d)\nx.ones(1)\ntorch.Generator()\ntorch.Generator('cpu')"
    ) == [
        "1: torch.zeros(3)",
        "4: torch.Generator()",
    ]
    for package in ("lora_da", "axolotl_lora_da", "trl_integration"):
        for path in (ROOT / package).rglob("*.py"):
            assert not homeless(path.read_text(encoding="utf-8")), path


def started(device: str | None, **settings: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights, where `device` is the default of the user's process, whose collator names its own."""
    model, rows, config = with_lora(tiny_llama()), documents(20), as_solved(samples=8, **settings)

    def collate(some: list[Document]) -> dict[str, torch.Tensor]:
        with torch.device("cpu"):
            return pad(some)

    torch.set_default_device(device)
    try:
        report = initialize_lora_da_weights(model, DataLoader(rows, 4, collate_fn=collate), config, show_progress=False)
    finally:
        torch.set_default_device(None)
    assert report.initialized == report.targeted
    return adapter_weights(model)


@pytest.mark.parametrize("settings", [{}, {"seed": 1}, {"preset": "paper"}, {"first_step": "measured"}], ids=str)
def test_a_default_device_changes_nothing(settings: dict[str, Any]) -> None:
    """On `meta`, what is made without saying where has no numbers."""
    expected = started(None, **settings)
    found = started("meta", **settings)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_batches_that_a_collator_makes_on_a_gpu() -> None:
    """They are kept on the CPU, as all others are."""
    rows, settings = documents(20), as_solved(samples=8)

    def on_gpu(some: list[Document]) -> dict[str, torch.Tensor]:
        return {name: value.to("cuda") for name, value in pad(some).items()}

    made = []
    with fake_gpus():
        for collate in (pad, on_gpu):
            model = with_lora(tiny_llama()).to("cuda")
            loader = DataLoader(rows, 4, collate_fn=collate)
            initialize_lora_da_weights(model, loader, settings, show_progress=False)
            made.append(adapter_weights(model))
        assert all(torch.equal(made[1][name], value) for name, value in made[0].items())
