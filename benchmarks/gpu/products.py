"""The matrix products of the statistics of one block of an 8B's shape, by the tokens of a batch."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch

from benchmarks.floor import Products, Shapes
from benchmarks.gpu.parts import Figures, Part, Place
from benchmarks.measure import measured
from benchmarks.qlora import DTYPE
from lora_da.memory import GIB
from lora_da.products import SYMMETRIC_BLOCKS, SYMMETRIC_FROM

BATCHES = (300, 2048, 8192)  # tokens
TOKENS = 65_536  # in all


def parts(place: Place) -> list[Part]:
    batches = (8, 32) if place.toy else BATCHES
    return [Part(f"batches of {n} tokens", partial(_products, place, n)) for n in batches]


def _products(place: Place, n: int) -> Figures:
    hidden, inner = (64, 192) if place.toy else (4096, 14336)
    shapes = block_shapes(hidden, inner, hidden // 4)
    batches = max(2, (128 if place.toy else TOKENS) // n)
    measured(Products(shapes, [n], place.device).run, place.device)
    _, cost = measured(Products(shapes, [n] * batches, place.device).run, place.device)
    one = torch.randn(n, inner, dtype=DTYPE, device=place.device)
    other = torch.randn(n, hidden, dtype=DTYPE, device=place.device)

    def plainly() -> None:  # torch's own product of the largest of these shapes, nothing summed
        for _ in range(batches):
            one.T @ other

    measured(plainly, place.device)
    _, plain = measured(plainly, place.device)
    tokens = n * batches
    figures: Figures = {
        "tokens": tokens,
        "seconds": cost.seconds,
        "tflops": tokens * flop(shapes) / cost.seconds / 1e12,
        "plain_tflops": tokens * 2 * hidden * inner / plain.seconds / 1e12,
    }
    return figures if cost.gpu_increase is None else {**figures, "sums_gib": cost.gpu_increase / GIB}


def block_shapes(hidden: int, inner: int, keys: int) -> Shapes:
    """Shape a Llama's block: queries, keys and values share an input, gate and up another."""
    layers = {(hidden, hidden): 2, (keys, hidden): 2, (inner, hidden): 2, (hidden, inner): 1}
    return Shapes(Counter({hidden: 3, inner: 1}), Counter(layers))


def flop(shapes: Shapes) -> float:
    """Operations for one token: dᵀx of each layer, and of each xᵀx what is computed of it."""
    symmetric = (1 + 1 / SYMMETRIC_BLOCKS) / 2
    inputs = sum(count * i * i * (symmetric if i >= SYMMETRIC_FROM else 1.0) for i, count in shapes.inputs.items())
    return 2 * (inputs + sum(count * o * i for (o, i), count in shapes.layers.items()))
