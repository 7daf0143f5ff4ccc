"""Whatever trains has a plan, on any card, with any memory of the CPU, for any model and rows, at a bounded cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora_da.collect.plan
import lora_da.processes
from lora_da.collect.plan import CPU_SHARE, DEVICE_SHARE, ENOUGH, ENOUGH_BORDERS, Plan, make_plan
from lora_da.collect.sizes import kept_by_rule
from lora_da.collect.survey import Survey
from lora_da.memory import GIB
from lora_da.methods import METHODS
from lora_da.processes import Processes, Run
from lora_da.samples.batch import BATCH_TOKENS

pytestmark = pytest.mark.once

CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # GiB
CPUS = (8, 16, 32, 128, 512)  # GiB
ROWS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768)  # tokens
SAMPLES = 256
RANK = 16
CONTEXT = GIB // 2  # of CUDA itself


@dataclass(frozen=True)
class Shape:
    """A decoder of gated blocks with grouped attention, every linear layer of a block targeted.

    Args:
        blocks, hidden, inner, keys, vocabulary: its sizes.
        weight_bytes: of a number in a block's linear layers; embeddings, head and hidden states have 2 bytes each.
    """

    blocks: int
    hidden: int
    inner: int
    keys: int
    vocabulary: int
    weight_bytes: float

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs by layer."""
        h, inner, keys = self.hidden, self.inner, self.keys
        attention = {"q": (h, h), "k": (h, keys), "v": (h, keys), "o": (h, h)}
        return attention | {"gate": (h, inner), "up": (h, inner), "down": (inner, h)}

    @property
    def features(self) -> int:
        """Inputs and outputs of a block's linear layers."""
        return sum(i + o for i, o in self.linear.values())

    @property
    def adapter(self) -> int:
        """Parameters."""
        return self.blocks * RANK * self.features

    @property
    def loaded(self) -> int:
        """Bytes of the model and its adapter in float32."""
        linear = self.blocks * self.weight_bytes * sum(i * o for i, o in self.linear.values())
        return int(linear + 2 * 2 * self.vocabulary * self.hidden + 4 * self.adapter)

    def training(self, row: int) -> int:
        """Bytes that a step of checkpointed training takes beside the loaded model, of one row of tokens.

        The adapter's gradients and its optimiser's two moments in float32; the hidden state that enters each block;
        the activations of one block: inputs and outputs of its linear layers, and half as much for norms, attention and
        the gate, with the gradients of a hidden state, of the widest layer's input and output; a dequantised weight;
        the logits of 256 tokens in 16 bits and float32, their gradients and softmax.
        """
        widest, weight = (max(of(layer) for layer in self.linear.values()) for of in (sum, lambda io: io[0] * io[1]))
        step = 2 * self.hidden * self.blocks + 1.5 * 2 * self.features + 4 * 2 * self.hidden + 4 * widest
        return int(12 * self.adapter + row * step + 2 * weight + 14 * 256 * self.vocabulary)

    def at_a_border(self, row: int) -> int:
        """Bytes of the samples' hidden states, each batch's in pinned memory, which comes in powers of two."""
        batch = max(row, BATCH_TOKENS // row * row)
        return SAMPLES * row // batch * 2 ** math.ceil(math.log2(batch * 2 * self.hidden))

    @property
    def statistics(self) -> int:
        """Bytes of what no training has: the sums of the layer that has most of them, and a product to be added."""
        return max(4 * (i * i + i * o + o) + 4 * i * o for i, o in self.linear.values())


MODELS = {
    "1B": (16, 2048, 8192, 512, 128256),
    "3B": (28, 3072, 8192, 1024, 128256),
    "8B": (32, 4096, 14336, 1024, 128256),
    "14B": (48, 5120, 13824, 1024, 152064),
    "32B": (64, 5120, 27648, 1024, 152064),
    "70B": (80, 8192, 28672, 1024, 128256),
}
SHAPES = {
    f"{name} in {kind}": Shape(*sizes, weight_bytes=size)
    for name, sizes in MODELS.items()
    for kind, size in {"4 bits": 0.53, "16 bits": 2.0}.items()
}


@lru_cache
def surveyed(shape: Shape) -> tuple[Survey, list[Any]]:
    """What a survey of it finds, and its layers."""
    layers = [
        SimpleNamespace(name=f"{block}.{name}", in_features=i, out_features=o, is_head=False)
        for block in range(shape.blocks)
        for name, (i, o) in shape.linear.items()
    ]
    first = {"k": "q", "v": "q", "up": "gate"}
    like = {layer.name: layer.name.replace(n, first.get(n, n)) for layer in layers for n in [layer.name.split(".")[1]]}
    survey = Survey(
        sequence=SimpleNamespace(),  # type: ignore[arg-type]
        why_not="",
        block_of={layer.name: int(layer.name.split(".")[0]) for layer in layers},
        routed={},
        reads_like=like,
        bytes_per_token=2 * shape.hidden,
        itemsize=2,
        vocabulary=shape.vocabulary,
        linear_features=(shape.features,) * shape.blocks,
        kept=kept_by_rule(shape.features, shape.hidden, 2),
        widest=max(i + o for i, o in shape.linear.values()),
        kept_weights=(0,) * shape.blocks,
        dequantised=0 if shape.weight_bytes == 2 else 2 * max(i * o for i, o in shape.linear.values()),
        in_16_bits=True,
        product_itemsize=0,
        cast_head=0,
        eager_heads=0,
        makes_masks=True,
        checkpointed=False,
        gathered_bytes=0,
        devices=("cuda:0",),
    )
    return survey, layers


def batches_of(row: int) -> list[Any]:
    rows = max(1, BATCH_TOKENS // row)
    tokens = SimpleNamespace(n_documents=rows)
    return [SimpleNamespace(shape=(rows, row), n_positions=rows * row, tokens=tokens, is_masked=lambda: False)] * (
        SAMPLES // rows
    )


def planned(
    shape: Shape, card: int, cpu: int, row: int, monkeypatch: pytest.MonkeyPatch, is_integrated: bool = False
) -> Plan:
    """The plan on a card of so many bytes, with so many free on the CPU."""
    properties = SimpleNamespace(is_integrated=is_integrated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    free = {"cuda": card - CONTEXT - shape.loaded, "cpu": cpu}
    monkeypatch.setattr(lora_da.processes, "free_bytes", lambda device: free[device.type])
    monkeypatch.setattr(lora_da.collect.plan, "used_bytes", lambda device: shape.loaded)
    run = Run(Processes(), torch.device("cuda"), None, False)
    return make_plan(*surveyed(shape), batches_of(row), METHODS["lora_da"].needs, run)


@pytest.mark.parametrize("name", SHAPES)
def test_whatever_trains_has_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the card and the CPU's memory; at most 2.5 times as costly as with all the memory there could be wherever
    three borders have room, and with a sentence that says what would help where it is more."""
    shape = SHAPES[name]
    at_a_border = {row: shape.at_a_border(row) for row in ROWS}
    for card in CARDS:
        for row in ROWS:
            free = DEVICE_SHARE * (card * GIB - CONTEXT - shape.loaded)
            if shape.training(row) + shape.statistics > free:
                continue
            plenty = planned(shape, card * GIB, 2**50, row, monkeypatch)
            for cpu in CPUS:
                plan, where = planned(shape, card * GIB, cpu * GIB, row, monkeypatch), (card, cpu, row)
                assert plan.device_bytes <= plan.budget, where
                assert plan.cpu_bytes <= CPU_SHARE * cpu * GIB, where
                assert sum(len(s.layers) for s in plan.segments) == 7 * shape.blocks, where
                if CPU_SHARE * cpu * GIB >= ENOUGH_BORDERS * at_a_border[row]:
                    assert plan.cost <= ENOUGH * plenty.cost and not plan.warning, (*where, plan.cost / plenty.cost)
                assert ("is short" in plan.warning) == (plan.cost > ENOUGH * plenty.cost), where
                if plan.warning:
                    fit = int(SAMPLES * CPU_SHARE * cpu * GIB / (ENOUGH_BORDERS * at_a_border[row]))
                    assert f"set `samples` to {fit}" in plan.warning or not fit, where


def test_memory_that_a_gpu_shares_with_the_cpu_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned with on both sides is less than there is."""
    shape, free = SHAPES["8B in 4 bits"], 32 * GIB
    apart = planned(shape, free + CONTEXT + shape.loaded, free, 2048, monkeypatch)
    assert apart.budget == int(DEVICE_SHARE * free)
    plan = planned(shape, free + CONTEXT + shape.loaded, free, 2048, monkeypatch, is_integrated=True)
    assert plan.borders < apart.borders
    assert plan.budget + plan.borders * shape.at_a_border(2048) < free
