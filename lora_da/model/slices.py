"""Experts whose matrices are slices of one parameter: no module multiplies by one of them, so that a hook sees them all
or none.

Where such experts run one after the other, each product is a function of torch's whose second factor is a view of the
parameter, and its place in memory tells the expert. What is computed in another way, by a kernel or for all experts at
once, is not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from lora_da.model.forward import replaced
from lora_da.model.sharding import copied, is_shard
from lora_da.model.state import attribute
from lora_da.model.weights import norm_of

# Products of x (…, i) with a matrix, which is (o, i) in the first and (i, o) in the others; where x is among what they
# are given, the matrix behind it.
PRODUCTS: dict[Any, int] = {
    nn.functional.linear: 0,
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), 0),
    **dict.fromkeys((torch.addmm, Tensor.addmm), 1),
}


@dataclass(frozen=True)
class Stack:
    """A parameter that holds the matrices of all experts, (experts, o, i), or one matrix, (o, i).

    Args:
        module: whose it is.
        parameter: its name there.
        is_transposed: whether the matrices are stored as (i, o).
    """

    module: nn.Module
    parameter: str
    is_transposed: bool

    @property
    def is_parametrised(self) -> bool:
        """Whether its module multiplies by what is made of it at each call, as where it is quantised."""
        return parametrize.is_parametrized(self.module, self.parameter)

    @cached_property
    def norms(self) -> list[float]:
        """‖W‖_F of each matrix. A quantised parameter is dequantised once for all."""
        value = self._value()
        return [norm_of(matrix) for matrix in (value if value.dim() == 3 else [value])]

    def matrix(self, number: int | None) -> Tensor:
        """W, (o, i), of an expert, or the only one."""
        value = self._value()
        matrix = value if number is None else value[number]
        return matrix.T if self.is_transposed else matrix

    def _value(self) -> Tensor:
        """What the module multiplies by, dequantised where a parametrisation does that."""
        value: Tensor = getattr(self.module, self.parameter)
        return copied(value) if is_shard(value) else value.detach()


@dataclass(frozen=True)
class Slice:
    """One matrix in a parameter.

    Args:
        stack: the parameter.
        number: the expert's; None where the parameter is one matrix, which all tokens meet.
    """

    stack: Stack
    number: int | None

    @property
    def weight(self) -> Tensor:
        """W, (o, i)."""
        return self.stack.matrix(self.number)

    @property
    def why_unseen(self) -> str:
        """What to say where no product with it, nor with another of its parameter, was told of."""
        kind = type(self.stack.module).__name__
        return (
            f"no product of {kind} with a matrix of `{self.stack.parameter}` was seen: a kernel computes them all in "
            "one, or they are multiplied from the other side than PEFT takes them for"
        )

    @property
    def norm(self) -> float:
        """‖W‖_F."""
        return self.stack.norms[self.number or 0]


# Is told of a product's matrix and x, and gives what takes the place of its output.
Told = Callable[[Slice, Tensor, Tensor], Tensor]


@contextlib.contextmanager
def products_told(module: nn.Module, tell: Told) -> Iterator[None]:
    """While the context is open, products of the module's own forward with slices of its own parameters are told of.

    Args:
        module: whose parameters are told apart.
        tell: is called with slice, x (…, i) and output (…, o).
    """
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # where a parametrisation dequantises, it does so once, and all products are with slices of the same tensor
        with parametrize.cached(), _Products(module, tell):
            return original(*args, **kwargs)

    with replaced(module, forward):
        yield


@contextlib.contextmanager
def expert_by_expert(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules that transformers lets run in several ways multiply by one expert after the other meanwhile."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in modules)}
    with contextlib.ExitStack() as stack:
        for config in configs.values():
            if hasattr(config, "_experts_implementation_internal"):
                stack.enter_context(attribute(config, "_experts_implementation_internal", "eager"))
        yield


class _Products(TorchFunctionMode):
    def __init__(self, module: nn.Module, tell: Told) -> None:
        super().__init__()
        self._module, self._tell = module, tell
        self._values: dict[str, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func not in PRODUCTS:
            return output
        first = PRODUCTS[func]
        x, matrix = [*args, *kwargs.values()][first : first + 2]
        if x.dim() < 2 or matrix.dim() < 2:
            return output
        found = self._slice_of(matrix if func is nn.functional.linear else matrix.mT)
        return output if found is None else self._tell(found, x, output)

    def _slice_of(self, matrix: Tensor) -> Slice | None:
        """Whose a matrix (o, i) is; None where it is not the whole of a slice."""
        if self._values is None:
            names = [name for name, _ in self._module.named_parameters(recurse=False)]
            names += getattr(self._module, "parametrizations", ())
            self._values = {name: getattr(self._module, name) for name in names}
        matrix = matrix[0] if matrix.dim() == 3 and len(matrix) == 1 else matrix
        for name, value in self._values.items():
            found = _place(matrix, value)
            if found is not None:
                return Slice(Stack(self._module, name, is_transposed=found[1]), found[0])
        return None


def _place(matrix: Tensor, value: Tensor) -> tuple[int | None, bool] | None:
    """The number of a matrix (o, i) in a parameter's value, and whether it is stored transposed; None if it is no whole
    slice of it."""
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in (matrix, value)):
        return None  # what another kind holds is not what it seems
    if matrix.untyped_storage().data_ptr() != value.untyped_storage().data_ptr() or value.dim() not in (2, 3):
        return None
    number, whole = None, value
    if value.dim() == 3:
        number = (matrix.storage_offset() - value.storage_offset()) // value.stride(0)
        whole = value[number]
    layout = matrix.storage_offset(), matrix.shape, matrix.stride()
    for is_transposed, stored in ((False, whole), (True, whole.mT)):
        if layout == (stored.storage_offset(), stored.shape, stored.stride()):
            return number, is_transposed
    return None
