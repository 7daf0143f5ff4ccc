"""What one layer's tokens leave behind: running sums of (x, d), and the means the methods read.

Letters, here and everywhere: `n` counted tokens, `i` the layer's input width, `o` its output width, `r` the rank.
`x` is the layer's input, `d` the gradient of the loss at its output. A name that ends in `_` is a sum, not a mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_da.needs import Needs, Sums
from lora_da.products import add_product, add_squares, block_rows, sum_dtype


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
            self.sigma_xx_ = torch.zeros(i, i, dtype=sum_dtype(x), device=x.device)
        for start, stop in block_rows(i):
            add_product(self.sigma_xx_[start:stop, :stop], x[:, start:stop], x[:, :stop])

    def take_mean(self) -> Tensor | None:
        """Z, (i, i), in the memory of the sum, which is used up; None where nothing was seen or nobody reads it. It is
        kept for the other layers that share it."""
        if self._mean is None and self.sigma_xx_ is not None and self.n_tokens:
            for start, stop in block_rows(self.sigma_xx_.shape[0]):
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
            self.sigma_dx_ = torch.zeros(d.shape[1], x.shape[1], dtype=sum_dtype(x), device=x.device)
        if self.needs.sums.output_fisher and self.sigma_dd_ is None:
            self.sigma_dd_ = torch.zeros(self.fisher_shape(d.shape[1]), dtype=sum_dtype(d), device=d.device)
        if self.sigma_dx_ is not None:
            add_product(self.sigma_dx_, d, x)
        if self.sigma_dd_ is not None and self.sigma_dd_.dim() == 2:
            add_product(self.sigma_dd_, d, d)
        elif self.sigma_dd_ is not None:
            add_squares(self.sigma_dd_, d)

    def note(self, x: Tensor, o: int) -> None:
        """Note that the layer has made (n, o) of x (n, i): all there is to be known without a backward pass."""
        self.shape = (o, x.shape[1], sum_dtype(x))

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


def input_bytes(in_features: int) -> int:
    """Bytes of one float32 Σ x xᵀ."""
    return 4 * in_features**2


def gradient_bytes(in_features: int, out_features: int, needs: Needs) -> int:
    """Bytes of one layer's float32 Σ d xᵀ and Σ d dᵀ, as far as they are taken."""
    fisher = out_features**2 if needs.full_fisher(out_features) else out_features
    return 4 * (needs.sums.grad * in_features * out_features + needs.sums.output_fisher * fisher)
