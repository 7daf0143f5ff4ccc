"""How often torch is asked for a matrix decomposition; a batched call is one, triangular solves are none."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

DECOMPOSITIONS = ("qr", "eigh", "eig", "svd", "cholesky", "cholesky_ex", "lu_factor", "inv_ex", "solve_ex", "lstsq")
KERNELS = {f"linalg_{name}" for name in DECOMPOSITIONS} | {f"_linalg_{name}" for name in DECOMPOSITIONS}
OTHERS = {"geqrf", "linalg_householder_product", "cholesky", "cholesky_inverse", "cholesky_solve", "linalg_eigvals"}


class Decompositions(TorchDispatchMode):
    """Counts them while it is entered.

    Attributes:
        calls: by the name of the kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.calls.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in KERNELS | OTHERS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))
