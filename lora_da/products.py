"""Products that are added to sums in float32, in the dtypes that a device multiplies fastest for the same result."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lora_da.memory import is_out_of_memory

# A symmetric product is made of block rows, each up to the diagonal: 5/8 of the work with four of them. Below this
# width the smaller matrices cost more than that saves.
SYMMETRIC_BLOCKS = 4
SYMMETRIC_FROM = 512
HALF = (torch.bfloat16, torch.float16)


def summable(rows: Tensor, computed_in: torch.dtype) -> Tensor:
    """`rows` in the precision that the layer itself has for them, in a dtype whose products are summed in float32.

    That is the 16 bit in which the layer itself multiplies on a GPU whose matrix products accumulate and return float32
    (but for float16 from float32: gradients would underflow); float32 or better elsewhere.

    Args:
        rows: x or d of a layer.
        computed_in: the dtype that the layer casts its input to.
    """
    if rows.device.type != "cpu" and (rows.dtype in HALF or computed_in == torch.bfloat16):
        half = rows.dtype if rows.dtype in HALF else computed_in
        if returns_float32(rows.device, half):
            return rows.to(half)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ (p, q) += aᵀ b for a (n, p), b (n, q), in the dtypes of `summable` and `sum_dtype`."""
    if a.dtype not in HALF:
        with full_float32():
            sum_.addmm_(a.T, b)
    elif adds_float32(a.device, a.dtype):
        _add_widened(sum_, a, b)
    else:
        sum_ += torch.mm(a.T, b, out_dtype=torch.float32)


def add_squares(sum_: Tensor, d: Tensor) -> None:
    """sum_ (o,) += Σ d² for d (n, o), in the dtypes of `summable` and `sum_dtype`."""
    if d.dtype in HALF:  # a reduction widens what it reads: no d of 32 bit is made, nor its squares
        sum_ += torch.linalg.vector_norm(d, dim=0, dtype=torch.float32).square()
    else:
        sum_ += (d * d).sum(0)


def multiplies_16_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers that compute in a dtype have their products made of 16 bits."""
    return device.type != "cpu" and dtype in HALF and returns_float32(device, dtype)


def product_itemsize(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of a number in a product that is made before it is added to its sum; 0 where it is added as it is made."""
    return 4 if multiplies_16_bits(device, dtype) and not adds_float32(device, dtype) else 0


def sum_dtype(x: Tensor) -> torch.dtype:
    """What products of x are summed in."""
    return torch.float32 if x.dtype in HALF else x.dtype


def block_rows(i: int) -> list[tuple[int, int]]:
    """Where the block rows of a symmetric (i, i) sum begin and end."""
    step = -(-i // SYMMETRIC_BLOCKS) if i >= SYMMETRIC_FROM else i
    return [(start, min(start + step, i)) for start in range(0, i, step)]


@functools.lru_cache
def returns_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU's products of 16 bit can return float32, as it is found out once: ROCm, old CUDA and XPU refuse it.

    Raises:
        RuntimeError: memory ran out, so that nothing was found out.
    """
    one = torch.ones(8, 8, dtype=dtype, device=device)
    return _is_taken(lambda: torch.mm(one, one, out_dtype=torch.float32))


@functools.lru_cache
def adds_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they can be added to a float32 sum in its memory, a part of a larger matrix included, as it is found out
    once, and that right: torch has learned it later, and only where products return float32.

    Raises:
        RuntimeError: memory ran out, so that nothing was found out.
    """
    one = torch.ones(8, 8, dtype=dtype, device=device)
    sums = torch.ones(8, 16, device=device)[:, :8]
    return _is_taken(lambda: _add_widened(sums, one, one)) and bool((sums == 9).all())


def _add_widened(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(sum_, a.T, b, out_dtype=torch.float32, out=sum_)


def _is_taken(ask: Callable[[], object]) -> bool:
    """Whether the device does what it is asked for."""
    try:
        ask()
    except (RuntimeError, TypeError) as error:  # a dtype that it refuses; an argument that this torch does not have
        if is_out_of_memory(error):
            raise
        return False
    return True


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
