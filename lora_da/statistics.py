"""What one layer's tokens leave behind: running sums of (x, d), and the means the methods read.

Letters, here and everywhere: `n` counted tokens, `i` the layer's input width, `o` its output width, `r` the rank.
`x` is the layer's input, `d` the gradient of the loss at its output. A name that ends in `_` is a sum, not a mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lora_da.ranks import Ranks

# A symmetric product is made of block rows, each up to the diagonal: 5/8 of the work with four of them. Below this
# width the smaller matrices cost more than that saves.
SYMMETRIC_BLOCKS = 4
SYMMETRIC_FROM = 512
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerStatistics:
    """Means of one layer over the init samples.

    Args:
        grad: G, (o, i): gradient of the loss in the layer's weight.
        input_cov: Z, (i, i): mean over the counted tokens of x xᵀ.
        output_fisher: Y, (o,) its diagonal or (o, o): mean over the counted tokens of d dᵀ (empirical Fisher).
        n_tokens: counted tokens.
    """

    grad: Tensor
    input_cov: Tensor
    output_fisher: Tensor
    n_tokens: int

    def to(self, device: torch.device) -> LayerStatistics:
        """The same on another device."""
        grad, input_cov, fisher = (t.to(device) for t in (self.grad, self.input_cov, self.output_fisher))
        return LayerStatistics(grad, input_cov, fisher, self.n_tokens)


class InputSums:
    """Σ x xᵀ over the counted tokens, one for all layers that read the same tensor."""

    def __init__(self) -> None:
        self.sigma_xx_: Tensor | None = None  # (i, i); of wide inputs only the blocks on and below the diagonal
        self.n_tokens = 0
        self._mean: Tensor | None = None

    def add(self, x: Tensor) -> None:  # x (n, i), in a dtype of `summable`
        i = x.shape[1]
        if self.sigma_xx_ is None:
            self.sigma_xx_ = torch.zeros(i, i, dtype=_sum_dtype(x), device=x.device)
        for start, stop in _block_rows(i):
            _add_product(self.sigma_xx_[start:stop, :stop], x[:, start:stop], x[:, :stop])
        self.n_tokens += x.shape[0]

    def reduce(self, ranks: Ranks, owner: int, i: int, like: Tensor) -> None:
        """Sum over the processes; whole in `owner` then, and gone elsewhere. `like` has the dtype and device."""
        sigma_xx_ = like.new_zeros(i, i) if self.sigma_xx_ is None else self.sigma_xx_
        ranks.sum_to(owner, sigma_xx_)
        self.sigma_xx_ = sigma_xx_ if ranks.rank == owner else None

    def mean(self) -> Tensor | None:
        """Z, (i, i), in the memory of the sum, which is used up; None where nothing was seen."""
        if self._mean is None and self.sigma_xx_ is not None and self.n_tokens:
            for start, stop in _block_rows(self.sigma_xx_.shape[0]):
                self.sigma_xx_[:start, start:stop] = self.sigma_xx_[start:stop, :start].T
            self._mean, self.sigma_xx_ = self.sigma_xx_.div_(self.n_tokens), None
        return self._mean


class LayerSums:
    """Σ d xᵀ and Σ d dᵀ (or its diagonal Σ d²) over the counted tokens of one layer."""

    def __init__(self, inputs: InputSums, full_fisher: bool) -> None:
        self.inputs = inputs
        self.full_fisher = full_fisher
        self.sigma_dx_: Tensor | None = None  # (o, i)
        self.sigma_dd_: Tensor | None = None  # (o,) or (o, o)

    @property
    def shape(self) -> tuple[int, int, torch.dtype]:
        """o, i and the dtype of the sums."""
        assert self.sigma_dx_ is not None, "nothing was added"
        return *self.sigma_dx_.shape, self.sigma_dx_.dtype

    def add(self, x: Tensor, d: Tensor) -> None:  # x (n, i), d (n, o), in one dtype of `summable`
        o, i = d.shape[1], x.shape[1]
        if self.sigma_dx_ is None or self.sigma_dd_ is None:
            self.sigma_dx_ = torch.zeros(o, i, dtype=_sum_dtype(x), device=x.device)
            self.sigma_dd_ = self.sigma_dx_.new_zeros((o, o) if self.full_fisher else (o,))
        _add_product(self.sigma_dx_, d, x)
        if self.full_fisher:
            _add_product(self.sigma_dd_, d, d)
        else:
            d = d.to(self.sigma_dd_.dtype)
            self.sigma_dd_ += (d * d).sum(0)

    def reduce(self, ranks: Ranks, owner: int, o: int, i: int, like: Tensor) -> None:
        """Sum over the processes; whole in `owner` then, and gone elsewhere. `like` has the dtype and device."""
        if self.sigma_dx_ is None or self.sigma_dd_ is None:
            self.sigma_dx_ = like.new_zeros(o, i)
            self.sigma_dd_ = like.new_zeros((o, o) if self.full_fisher else (o,))
        ranks.sum_to(owner, self.sigma_dx_)
        ranks.sum_to(owner, self.sigma_dd_)
        if ranks.rank != owner:
            self.sigma_dx_ = self.sigma_dd_ = None

    def means(self, n_units: float, scale: float = 1.0) -> LayerStatistics | None:
        """The means, in the memory of the sums, which are used up; None where nothing was seen.

        Args:
            n_units: samples or loss tokens to average the gradient over.
            scale: the factor that every d carries.
        """
        cov = self.inputs.mean()
        if cov is None or self.sigma_dx_ is None or self.sigma_dd_ is None:
            return None
        n = self.inputs.n_tokens
        grad, fisher = self.sigma_dx_.div_(n_units * scale), self.sigma_dd_.div_(scale).div_(scale * n)
        self.sigma_dx_ = self.sigma_dd_ = None
        return LayerStatistics(grad, cov, fisher, n)


def summable(rows: Tensor, computed_in: torch.dtype) -> Tensor:
    """`rows` in the precision that the layer itself has for them, in a dtype whose products are summed in float32.

    That is the 16 bit in which the layer itself multiplies on CUDA, where matrix products accumulate and return
    float32 (but for float16 from float32: gradients would underflow); float32 or better elsewhere.

    Args:
        rows: x or d of a layer.
        computed_in: the dtype that the layer casts its input to.
    """
    if rows.device.type == "cuda" and (rows.dtype in HALF or computed_in == torch.bfloat16):
        return rows if rows.dtype in HALF else rows.to(computed_in)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _block_rows(i: int) -> list[tuple[int, int]]:
    """Where the block rows of a symmetric (i, i) sum begin and end."""
    step = -(-i // SYMMETRIC_BLOCKS) if i >= SYMMETRIC_FROM else i
    return [(start, min(start + step, i)) for start in range(0, i, step)]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in HALF else x.dtype


def _add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ (p, q) += aᵀ b for a (n, p), b (n, q)."""
    if a.dtype in HALF:
        sum_ += torch.mm(a.T, b, out_dtype=torch.float32)
        return
    with full_float32():
        sum_.addmm_(a.T, b)


def input_bytes(in_features: int) -> int:
    """Bytes of one float32 Σ x xᵀ."""
    return 4 * in_features**2


def gradient_bytes(in_features: int, out_features: int, full_fisher: bool) -> int:
    """Bytes of one layer's float32 Σ d xᵀ and Σ d dᵀ."""
    return 4 * (in_features * out_features + (out_features**2 if full_fisher else out_features))


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products on CUDA in float32 proper, also where the trainer lets its own run in TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
