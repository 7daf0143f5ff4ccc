"""The oracles of the methods beside LoRA-DA: dense, slow, in float64, written from their formulas.

They share no code with the product, nor with each other. Letters as in `oracle`: `n` tokens, `i` inputs, `o` outputs,
`r` rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def oracle_lora_one(grad: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """lora_A (r, i) and lora_B (o, r) of LoRA-One: with -G = U S V^T,

    B = U_r sqrt(S_r) / sqrt(S_0) / sqrt(gamma),    A = sqrt(S_r) V_r^T / sqrt(S_0) / sqrt(gamma)
    """
    u, s, vt = torch.linalg.svd(-grad.double())
    share = torch.diag((s[:rank] / s[0] / gamma).sqrt())
    return share @ vt[:rank], u[:, :rank] @ share


def oracle_lora_ga(grad: Tensor, rank: int, gamma: float) -> Tensor:
    """lora_A (r, i) of LoRA-GA's paper: the first r right singular vectors of G times m^(1/4) / sqrt(gamma)."""
    vt = torch.linalg.svd(grad.double()).Vh
    return vt[:rank] * grad.shape[0] ** 0.25 / math.sqrt(gamma)


def oracle_filet(weight: Tensor, input_cov: Tensor, output_fisher: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All Fisher energies (i) of FILet, and V_sel (i, r): pair after pair,

    v_k = normalised column k of W^T W,  u_k = normalised column k of W V,  E_k = (v_k^T Z v_k) (u_k^T Y u_k).
    """
    W, Z, Y = weight.double(), input_cov.double(), output_fisher.double()
    energies, directions = [], []
    for k in range(W.shape[1]):
        v = W.T @ W[:, k]
        v = v / v.norm()
        u = W @ v
        u = u / u.norm()
        energies.append((v @ Z @ v).item() * (u @ Y @ u).item())
        directions.append(v)
    order = sorted(range(len(energies)), key=energies.__getitem__)
    return torch.tensor(energies, dtype=torch.float64), torch.stack([directions[k] for k in order[:rank]], 1)


class ShiftProblem:
    """The constrained problem behind `cntlora`, on activations themselves.

    Each x of X (n, i) is seen with noise, which has the second moment mu c I with c = tr(Z) / i and is not correlated
    with X. Its pre-training partner is x_pre = T (x + noise), where the symmetric T makes their second moment
    (1 + mu) c I. The objective over dW (o, i) is

        J(dW) = mean |(W + dW) x - W x_pre|^2 + mu / (1 + mu) mean |dW x_pre|^2

    Args:
        x: (n, i), n at least 2 i.
        weight: W.
        mu: weight of the second constraint.
    """

    def __init__(self, x: Tensor, weight: Tensor, mu: float) -> None:
        n, i = x.shape
        c = x.square().sum() / n / i
        random = torch.randn(n, i, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
        apart = torch.linalg.qr(torch.cat([x, random], 1)).Q[:, i:]  # orthonormal, and orthogonal to X
        noisy = x + apart * (mu * c * n).sqrt()
        _, s, vt = torch.linalg.svd(noisy, full_matrices=False)
        to_pre = vt.T @ torch.diag(((1 + mu) * c * n).sqrt() / s) @ vt  # T
        self.x, self.x_pre, self.weight, self.share = x, noisy @ to_pre.T, weight, mu / (1 + mu)

    def objective(self, step: Tensor) -> Tensor:
        missed = self.x @ (self.weight + step).T - self.x_pre @ self.weight.T  # (n, o)
        moved = self.x_pre @ step.T
        return missed.square().sum(1).mean() + self.share * moved.square().sum(1).mean()

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Both constraints as one regression: inputs (2n, i) and what they should give (2n, o)."""
        inputs = torch.cat([self.x, math.sqrt(self.share) * self.x_pre])
        missing = (self.x_pre - self.x) @ self.weight.T
        return inputs, torch.cat([missing, torch.zeros_like(missing)])

    def solve(self, rank: int) -> Tensor:
        """dW of rank r with the least J, by reduced-rank regression: the full solution, projected on the leading
        directions of what it predicts."""
        inputs, wanted = self.stacked()
        full = torch.linalg.lstsq(inputs, wanted).solution.T  # (o, i)
        leading = torch.linalg.svd(full @ inputs.T, full_matrices=False).U[:, :rank]  # (o, r)
        return leading @ leading.T @ full

    def best_step(self, lora_A: Tensor) -> Tensor:
        """dW = B A with the least J of all B (o, r)."""
        inputs, wanted = self.stacked()
        return torch.linalg.lstsq(inputs @ lora_A.T, wanted).solution.T @ lora_A
