"""The layers of an adapter, and the one place that writes to the model: factors, in place, all or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
class Part:
    """One layer's factor in a parameter that holds those of several.

    Args:
        parameter: all of it.
        rows, columns: of it that are the layer's.
    """

    parameter: nn.Parameter
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = shape(self.parameter)
        return len(range(*self.rows.indices(rows))), len(range(*self.columns.indices(columns)))

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    def of(self, whole_value: Tensor) -> Tensor:
        """Its view of a value of the parameter."""
        return whole_value[self.rows, self.columns]


@dataclass(frozen=True)
class AdapterLayer:
    """One layer an adapter targets: `y = W x + scaling · lora_B lora_A x`.

    Args:
        name: of the PEFT layer in the PEFT model.
        base: the wrapped layer, quantised or not; of a slice, the module whose parameter it is in.
        lora_A: (r, i) parameter, or a slice's part of one. lora_B: (o, r), the same.
        scaling: s.
        plain_variance: variance of an entry of the lora_A that PEFT draws for this layer.
        magnitude: DoRA's (o,) parameter m, `y = m ∘ (W + scaling · lora_B lora_A) x / ‖row of that sum‖`; None in LoRA.
        is_head: whether it is the language-model head, which sees the tokens that carry loss alone.
        slice: the matrix in a parameter that the layer is (PEFT's `target_parameters`); None where it is a module.
    """

    name: str
    base: nn.Module
    lora_A: nn.Parameter | Part
    lora_B: nn.Parameter | Part
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
    def parameters(self) -> list[nn.Parameter]:
        """What an initialisation writes to."""
        factors = [_whole_of(self.lora_A), _whole_of(self.lora_B)]
        return factors + ([] if self.magnitude is None else [self.magnitude])

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Copies of lora_A (r, i) and lora_B (o, r) as they are."""
        lora_A, lora_B = (
            factor.of(copied(factor.parameter)) if isinstance(factor, Part) else copied(factor)
            for factor in (self.lora_A, self.lora_B)
        )
        return lora_A, lora_B

    def write(self, lora_A: Tensor, lora_B: Tensor, writing: Writing) -> None:
        """Put the factors into the parameters; DoRA's magnitude so that the layer starts at W + scaling·lora_B·lora_A,
        as plain LoRA does from the same factors."""
        writing.put(self.lora_A, lora_A)
        writing.put(self.lora_B, lora_B)
        if self.magnitude is not None:
            writing.put(self.magnitude, row_norms(self.base, *self.factors(), self.scaling))


class Writing:
    """Values on their way into parameters. Those of parts of one are put together when it is finished, as all of it:
    what a process holds of it may be a shard."""

    def __init__(self) -> None:
        self._wholes: dict[nn.Parameter, Tensor] = {}

    def put(self, factor: nn.Parameter | Part, value: Tensor) -> None:
        """Put a value, which all processes have."""
        if not isinstance(factor, Part):
            _put(factor, value)
            return
        if factor.parameter not in self._wholes:
            self._wholes[factor.parameter] = copied(factor.parameter)
        factor.of(self._wholes[factor.parameter]).copy_(value)

    def finish(self) -> None:
        """Put the parts."""
        _put_all(self._wholes.items())


@dataclass(frozen=True)
class Adapter:
    """The layers of one adapter: `layers` can be served, `left` (name → why) keep PEFT's init."""

    name: str
    layers: list[AdapterLayer]
    left: dict[str, str]

    def is_untrained(self) -> bool:
        """True while every lora_B is zero, as PEFT starts it."""
        return not any(_any(parameter) for parameter in dict.fromkeys(_whole_of(a.lora_B) for a in self.layers))

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
        before, writing = _values(chosen), Writing()
        try:
            with together():
                for layer in chosen:
                    layer.write(*factors[layer.name], writing)
                writing.finish()
        except BaseException:  # an interrupt too
            _put_all(before)
            raise

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """The parameters of its layers are as they were when the context is left, also after an error."""
        before = _values(self.layers)
        try:
            yield
        finally:
            _put_all(before)


def _whole_of(factor: nn.Parameter | Part) -> nn.Parameter:
    return factor.parameter if isinstance(factor, Part) else factor


def _any(parameter: nn.Parameter) -> bool:
    with whole(parameter) as value:
        return bool(value.any())


def _values(layers: Sequence[AdapterLayer]) -> list[tuple[nn.Parameter, Tensor]]:
    """What is in the parameters of some layers."""
    return [(p, copied(p)) for p in dict.fromkeys(p for layer in layers for p in layer.parameters)]


def _put_all(values: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in values:
        _put(parameter, value)


@torch.no_grad()
def _put(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a value that all processes have into a parameter, in place, whatever holds its numbers.

    DeepSpeed trains copies in float32 and writes them over the parameters at each step: they get the value too.
    """
    if is_zero3(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(shard_of(value, parameter) if isinstance(parameter, DTensor) else value)
    if is_zero3(parameter) or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


def variance_of_plain(rank: int, in_features: int, is_gaussian: bool) -> float:
    """Variance of an entry of the lora_A (r, i) that PEFT draws: kaiming_uniform(a=√5) draws from ±1/√i, its gaussian
    init with standard deviation 1/r."""
    return 1 / rank**2 if is_gaussian else 1 / (3 * in_features)
