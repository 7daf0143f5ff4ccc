"""FILet (arXiv 2605.01046), as far as it leaves the base alone: the directions of W that the loss is flattest along.

With colnorm dividing each column by its norm, Z the input covariance and Y the full output Fisher,

    V = colnorm(Wᵀ W)  (i, i),   U = colnorm(W V)  (o, i)        candidate pairs (u_k, v_k), without an SVD
    E_k = (v_kᵀ Z v_k)(u_kᵀ Y u_k)                               Fisher energy of a pair
    V_sel = the v_k with the r smallest E_k                      (i, r)

The paper goes on with s_k = √max(E_k, 1e-8), lora_A = diag(s) V_selᵀ/√scale, lora_B = U_sel diag(s)/√scale, and the
base loses scale·lora_B·lora_A. Two things differ here. The base is never changed, and a lora_B that is not zero would
move the model: lora_B = 0 keeps the start. And on the losses of language models, with gradients as small as theirs,
nearly every E_k is below 1e-8, so the paper's scale is one small number that says nothing of the layer: lora_A is
scaled to the input energy tr(A Z Aᵀ) that plain LoRA's is expected to have, as LoRA-DA's is by default, which keeps a
learning rate that was tuned for plain LoRA meaningful. The candidates are not orthogonal, in the paper and here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_da.methods.common import LayerSpec, LoraFactors, UnsolvableLayer, canonical_signs, checked, start_at_the_base
from lora_da.methods.method import Numbers
from lora_da.statistics import LayerStatistics

CANDIDATES = 1024  # pairs that are looked at together: U and V are never held whole


def filet(statistics: LayerStatistics, layer: LayerSpec, numbers: Numbers) -> LoraFactors:
    """Solve one layer, in the dtype of the statistics.

    Args:
        statistics: its input covariance and full output Fisher are read.
        layer: its rank r, its weight W and its plain variance.
        numbers: none of them concerns it.

    Raises:
        UnsolvableLayer: statistics or weight are not finite or zero, the weight has fewer than r columns that are not
            zero, or the samples have no input energy in the directions chosen.
    """
    cov = checked("input covariance", statistics.input_cov)
    fisher = checked("output Fisher", statistics.output_fisher)
    rank, weight = layer.rank, checked("weight", layer.weight, if_zero="").to(cov.dtype)
    weight = weight / weight.abs().max()
    energies = fisher_energies(weight, cov, fisher)  # (i,)
    if int(torch.isfinite(energies).sum()) < rank:
        raise UnsolvableLayer(
            f"its weight has {int(torch.isfinite(energies).sum())} columns that are not zero, below the rank {rank}"
        )
    chosen = energies.sort(stable=True).indices[:rank]
    directions = _column_normalised(weight.T @ weight[:, chosen])  # (i, r)
    directions = directions * canonical_signs(directions)
    lora_A, lora_B = start_at_the_base(directions, cov, layer.plain_variance, len(weight))
    return LoraFactors(lora_A, lora_B)


def solving(i: int, o: int) -> int:
    """Bytes that solving a layer takes: Z and Y scaled, W dequantised, in float32 and scaled, and a block of candidates
    with their products."""
    return 4 * (i**2 + o**2 + 3 * i * o + 4 * min(i, CANDIDATES) * (i + o))


def fisher_energies(weight: Tensor, cov: Tensor, fisher: Tensor) -> Tensor:
    """E_k of all candidate pairs, (i,), in units of the largest entries of Z and Y; infinite where column k of W is
    zero and there is no pair.

    Args:
        weight: W, (o, i). cov: Z, (i, i). fisher: Y, (o, o).
    """
    cov, fisher = cov / cov.abs().max(), fisher / fisher.abs().max()
    energies = []
    for columns in weight.split(CANDIDATES, dim=1):  # (o, b)
        v = _column_normalised(weight.T @ columns)  # (i, b)
        u = _column_normalised(weight @ v)  # (o, b)
        energy = (v * (cov @ v)).sum(0) * (u * (fisher @ u)).sum(0)
        energies.append(torch.where(v.any(0) & u.any(0), energy, torch.inf))
    return torch.cat(energies)


def _column_normalised(matrix: Tensor) -> Tensor:
    """Each column divided by its norm; zero columns stay."""
    norms = torch.linalg.vector_norm(matrix, dim=0)
    return matrix / torch.where(norms > 0, norms, 1.0)
