"""The layers of an adapter, and the one place that writes to the model: factors, in place, all or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_da.model.sharding import copied, is_zero3, shape, shard_of, whole
from lora_da.model.slices import Slice
from lora_da.model.weights import dense_weight, row_norms, weight_norm

SMALLEST = torch.finfo(torch.float32).tiny  # in the place of the norm of an all-zero weight


@dataclass(frozen=True)
class AdapterLayer:
    """One layer an adapter targets: `y = W x + scaling · lora_B lora_A x`.

    Args:
        name: of the PEFT layer in the PEFT model.
        base: the wrapped layer, quantised or not; of a slice, the module whose parameter it is in.
        lora_A: (r, i) parameter, or a slice's view of one. lora_B: (o, r), the same.
        scaling: s.
        plain_variance: variance of an entry of the lora_A that PEFT draws for this layer.
        magnitude: DoRA's (o,) parameter m, `y = m ∘ (W + scaling · lora_B lora_A) x / ‖row of that sum‖`; None in LoRA.
        is_head: whether it is the language-model head, which sees the tokens that carry loss alone.
        slice: the matrix in a parameter that the layer is (PEFT's `target_parameters`); None where it is a module.
    """

    name: str
    base: nn.Module
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    plain_variance: float
    magnitude: nn.Parameter | None = None
    is_head: bool = False
    slice: Slice | None = None

    @property
    def watched(self) -> nn.Module | Slice:
        """What is looked at for its inputs and outputs."""
        return self.base if self.slice is None else self.slice

    @property
    def rank(self) -> int:
        return shape(self.lora_A)[0]

    @property
    def in_features(self) -> int:
        return shape(self.lora_A)[1]

    @property
    def out_features(self) -> int:
        return shape(self.lora_B)[0]

    def is_trained(self) -> bool:
        """Whether lora_B is no longer zero, as PEFT starts it."""
        with whole(self.lora_B) as lora_B:
            return bool(lora_B.any())

    def can_hold(self, lora_A: Tensor, lora_B: Tensor) -> bool:
        """Whether the factors stay finite in the parameters' dtypes."""
        pairs = ((lora_A, self.lora_A), (lora_B, self.lora_B))
        return all(bool(torch.isfinite(value.to(parameter.dtype)).all()) for value, parameter in pairs)

    @torch.no_grad()
    def relative_step(self, lora_A: Tensor, lora_B: Tensor) -> float | None:
        """‖s·lora_B·lora_A‖_F / ‖W‖_F of factors for this layer; None where W cannot be read.

        A quantised W is dequantised on its device for the moment this takes; the product is not formed.
        """
        norm = weight_norm(self.base) if self.slice is None else self.slice.norm
        a, b = lora_A.cpu().double(), lora_B.cpu().double()
        step = abs(self.scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt().item()
        return None if norm is None else step / max(norm, SMALLEST)

    def weight(self) -> Tensor | None:
        """W, (o, i), dequantised on its device; None where PEFT cannot dequantise it."""
        return dense_weight(self.base) if self.slice is None else self.slice.weight

    @property
    def parameters(self) -> list[Tensor]:
        """What an initialisation writes."""
        return [self.lora_A, self.lora_B] + ([] if self.magnitude is None else [self.magnitude])

    def write(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Put the factors into the parameters; DoRA's magnitude so that the layer starts at W + scaling·lora_B·lora_A,
        as plain LoRA does from the same factors."""
        _put(self.lora_A, lora_A)
        _put(self.lora_B, lora_B)
        if self.magnitude is not None:
            _put(self.magnitude, row_norms(self.base, copied(self.lora_A), copied(self.lora_B), self.scaling))


@dataclass(frozen=True)
class Adapter:
    """The layers of one adapter: `layers` can be served, `left` (name → why) keep PEFT's init."""

    name: str
    layers: list[AdapterLayer]
    left: dict[str, str]

    def is_untrained(self) -> bool:
        """True while every lora_B is zero, as PEFT starts it."""
        return not any(layer.is_trained() for layer in self.layers)

    @torch.no_grad()
    def write(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        together: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Put (lora_A, lora_B) of the named layers into the parameters: in place, in their dtype, all or none.

        Args:
            factors: by layer.
            together: a context that is left by all processes or raises in all.
        """
        chosen = [layer for layer in self.layers if layer.name in factors]
        before = [(p, copied(p)) for layer in chosen for p in layer.parameters]
        try:
            with together():
                for layer in chosen:
                    layer.write(*factors[layer.name])
        except BaseException:  # an interrupt too
            _put_all(before)
            raise

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """The parameters of its layers are as they were when the context is left, also after an error."""
        with torch.no_grad():
            before = [(p, copied(p)) for layer in self.layers for p in layer.parameters]
        try:
            yield
        finally:
            _put_all(before)


def _put_all(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in values:
        _put(parameter, value)


@torch.no_grad()
def _put(parameter: Tensor, value: Tensor) -> None:
    """Copy a value that all processes have into a parameter, in place, whatever holds its numbers.

    DeepSpeed trains copies in float32 and writes them over the parameters at each step: they get the value too.
    """
    if is_zero3(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(shard_of(value, parameter) if isinstance(parameter, DTensor) else value)
    whole_of = parameter if parameter._base is None else parameter._base  # of a slice's view
    if is_zero3(parameter) or hasattr(whole_of, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        whole_value = value if whole_of is parameter else whole_of
        safe_set_full_fp32_param(whole_of, whole_value.to(parameter.device, torch.float32))


def variance_of_plain(rank: int, in_features: int, is_gaussian: bool) -> float:
    """Variance of an entry of the lora_A (r, i) that PEFT draws: kaiming_uniform(a=√5) draws from ±1/√i, its gaussian
    init with standard deviation 1/r."""
    return 1 / rank**2 if is_gaussian else 1 / (3 * in_features)
