"""What one layer's tokens leave behind: running sums of (x, d), and the means the methods read.

Letters, here and everywhere: `n` counted tokens, `i` the layer's input width, `o` its output width, `r` the rank.
`x` is the layer's input, `d` the gradient of the loss at its output. A name that ends in `_` is a sum, not a mean.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da.memory import is_out_of_memory
from lora_da.needs import Needs, Sums

# A symmetric product is made of block rows, each up to the diagonal: 5/8 of the work with four of them. Below this
# width the smaller matrices cost more than that saves.
SYMMETRIC_BLOCKS = 4
SYMMETRIC_FROM = 512
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerStatistics:
    """Means of one layer over the init samples; None where a method has no use for one.

    Args:
        grad: G, (o, i): gradient of the loss in the layer's weight.
        input_cov: Z, (i, i): mean over the counted tokens of x xᵀ.
        output_fisher: Y, (o,) its diagonal or (o, o): mean over the counted tokens of d dᵀ (empirical Fisher).
        n_tokens: counted tokens.
    """

    grad: Tensor | None
    input_cov: Tensor | None
    output_fisher: Tensor | None
    n_tokens: int

    def gradient_size(self, n_units: float) -> float | None:
        """‖G‖_F for each token of the layer's own, over √tr Z, so that neither large inputs nor how often an expert is
        asked count; over 1 where Z is not taken, None without G.

        Args:
            n_units: samples or loss tokens that the gradient is averaged over.
        """
        if self.grad is None:
            return None
        norm = torch.linalg.norm(self.grad).item() * n_units / self.n_tokens
        inputs = 1.0 if self.input_cov is None else self.input_cov.trace().item()
        return norm / math.sqrt(inputs) if inputs > 0 else norm

    def has_gradient(self) -> bool:
        """False where d was zero at every token; True where nobody reads it."""
        taken = [mean for mean in (self.grad, self.output_fisher) if mean is not None]
        return not taken or any(bool(mean.any()) for mean in taken)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(t.device for t in (self.grad, self.input_cov, self.output_fisher) if t is not None)

    def to(self, device: torch.device) -> LayerStatistics:
        """The same on another device."""
        means = (self.grad, self.input_cov, self.output_fisher)
        grad, input_cov, fisher = (None if t is None else t.to(device) for t in means)
        return LayerStatistics(grad, input_cov, fisher, self.n_tokens)


@dataclass(frozen=True)
class NotServed:
    """A layer that keeps PEFT's init.

    Args:
        why: its statistics cannot be taken, or have no solution; or no sample reads it.
        failed: whether that counts as a failure.
    """

    why: str
    failed: bool = True


class InputSums:
    """Σ x xᵀ over the counted tokens, one for all layers that read the same tensor; their number alone where nobody
    reads it."""

    def __init__(self, sums: Sums) -> None:
        self._taken = sums.input_cov
        self.sigma_xx_: Tensor | None = None  # (i, i); of wide inputs only the blocks on and below the diagonal
        self.n_tokens = 0
        self._mean: Tensor | None = None

    def add(self, x: Tensor) -> None:  # x (n, i), in a dtype of `summable`
        self.n_tokens += x.shape[0]
        if not self._taken:
            return
        i = x.shape[1]
        if self.sigma_xx_ is None:
            self.sigma_xx_ = torch.zeros(i, i, dtype=_sum_dtype(x), device=x.device)
        for start, stop in _block_rows(i):
            _add_product(self.sigma_xx_[start:stop, :stop], x[:, start:stop], x[:, :stop])

    def take_mean(self) -> Tensor | None:
        """Z, (i, i), in the memory of the sum, which is used up; None where nothing was seen or nobody reads it. It is
        kept for the other layers that share it."""
        if self._mean is None and self.sigma_xx_ is not None and self.n_tokens:
            for start, stop in _block_rows(self.sigma_xx_.shape[0]):
                self.sigma_xx_[:start, start:stop] = self.sigma_xx_[start:stop, :start].T
            self._mean, self.sigma_xx_ = self.sigma_xx_.div_(self.n_tokens), None
        return self._mean

    def free(self) -> None:
        """Forget Z, once all that share it have read it."""
        self._mean = None


class LayerSums:
    """Σ d xᵀ and Σ d dᵀ (or its diagonal Σ d²) over the counted tokens of one layer, as far as they are read.

    Attributes:
        shape: o, i and the dtype of the sums; None before the first tokens.
    """

    def __init__(self, inputs: InputSums, needs: Needs) -> None:
        self.inputs, self.needs = inputs, needs
        self.shape: tuple[int, int, torch.dtype] | None = None
        self.sigma_dx_: Tensor | None = None  # (o, i)
        self.sigma_dd_: Tensor | None = None  # (o,) or (o, o)

    def add(self, x: Tensor, d: Tensor) -> None:  # x (n, i), d (n, o), in one dtype of `summable`
        self.note(x, d.shape[1])
        if self.needs.sums.grad and self.sigma_dx_ is None:
            self.sigma_dx_ = torch.zeros(d.shape[1], x.shape[1], dtype=_sum_dtype(x), device=x.device)
        if self.needs.sums.output_fisher and self.sigma_dd_ is None:
            self.sigma_dd_ = torch.zeros(self.fisher_shape(d.shape[1]), dtype=_sum_dtype(d), device=d.device)
        if self.sigma_dx_ is not None:
            _add_product(self.sigma_dx_, d, x)
        if self.sigma_dd_ is not None and self.sigma_dd_.dim() == 2:
            _add_product(self.sigma_dd_, d, d)
        elif self.sigma_dd_ is not None:
            d = d.to(self.sigma_dd_.dtype)
            self.sigma_dd_ += (d * d).sum(0)

    def note(self, x: Tensor, o: int) -> None:
        """Note that the layer has made (n, o) of x (n, i): all there is to be known without a backward pass."""
        self.shape = (o, x.shape[1], _sum_dtype(x))

    def take_means(self, n_units: float, scale: float) -> LayerStatistics | None:
        """The means, in the memory of the sums, which are used up; None where nothing was seen.

        Args:
            n_units: samples or loss tokens to average the gradient over.
            scale: the factor that every d carries.
        """
        n = self.inputs.n_tokens
        if self.shape is None or n == 0:
            return None
        grad = None if self.sigma_dx_ is None else self.sigma_dx_.div_(n_units * scale)
        fisher = None if self.sigma_dd_ is None else self.sigma_dd_.div_(scale).div_(scale * n)
        self.sigma_dx_ = self.sigma_dd_ = None
        return LayerStatistics(grad, self.inputs.take_mean(), fisher, n)

    def fisher_shape(self, o: int) -> tuple[int, ...]:
        """Σ d dᵀ has it, for o outputs."""
        return (o, o) if self.needs.full_fisher(o) else (o,)


def summable(rows: Tensor, computed_in: torch.dtype) -> Tensor:
    """`rows` in the precision that the layer itself has for them, in a dtype whose products are summed in float32.

    That is the 16 bit in which the layer itself multiplies on a GPU whose matrix products accumulate and return float32
    (but for float16 from float32: gradients would underflow); float32 or better elsewhere.

    Args:
        rows: x or d of a layer.
        computed_in: the dtype that the layer casts its input to.
    """
    if rows.device.type == "cuda" and (rows.dtype in HALF or computed_in == torch.bfloat16):
        half = rows.dtype if rows.dtype in HALF else computed_in
        if returns_float32(rows.device, half):
            return rows.to(half)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


@functools.lru_cache
def returns_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU's products of 16 bit can return float32, as it is found out once: ROCm and old CUDA refuse it.

    Raises:
        RuntimeError: memory ran out, so that nothing was found out.
    """
    one = torch.ones(8, 8, dtype=dtype, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


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


def gradient_bytes(in_features: int, out_features: int, needs: Needs) -> int:
    """Bytes of one layer's float32 Σ d xᵀ and Σ d dᵀ, as far as they are taken."""
    fisher = out_features**2 if needs.full_fisher(out_features) else out_features
    return 4 * (needs.sums.grad * in_features * out_features + needs.sums.output_fisher * fisher)


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
