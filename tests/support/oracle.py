"""The oracle: LoRA-DA (arXiv 2510.24561), slow, dense and in float64.

Written from the formulas alone, so that the product can be judged by something that
shares no code with it. Nothing here streams, batches or saves memory: every token is
kept, every matrix is formed, every inverse is explicit.

Letters: `n` tokens, `i` layer inputs, `o` layer outputs, `r` rank. x_t (i) is a layer's
input at token t and d_t = dl/dy_t (o) the gradient of the loss at its output.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

IGNORED_LABEL = -100

Averaging = Literal["samples", "tokens"]
Document = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class OracleStatistics:
    """What one layer saw over the counted documents (those with a loss token)."""

    grad: Tensor  # (o, i)  G, the gradient of the averaged loss in the weight
    input_cov: Tensor  # (i, i)  Z, mean over n_tokens of x x^T
    output_fisher: Tensor  # (o, o)  Y, mean over n_tokens of d d^T
    n_tokens: int  # all tokens, prompts included
    n_samples: int  # documents
    n_loss_tokens: int  # tokens whose next label is not ignored


@dataclass(frozen=True)
class OracleFactors:
    """The two LoRA factors, and the problem whose solution they are."""

    lora_A: Tensor  # (r, i)
    lora_B: Tensor  # (o, r)
    subspace: Tensor  # (i, r)  A0, orthonormal columns
    eigenvalues: Tensor  # (i)     all of omega's, ascending: the first r are A0's
    omega: Tensor  # (i, i)  variance minus bias
    direction: Tensor  # (i, o)  D, divided by sigma where that was asked for


@torch.enable_grad()
def oracle_statistics(
    model: nn.Module,
    documents: Sequence[Document],
    layers: Sequence[str],
    averaging: Averaging,
) -> dict[str, OracleStatistics]:
    """G, Z and Y of each named layer, from one unpadded document at a time.

    `documents` hold `input_ids` and `labels` of one length; the token at t predicts
    labels[t + 1]. Document s has T_s loss tokens; its loss l_s is the mean of their
    cross-entropies ("samples") or their sum ("tokens"). Then, with d_t = dl_s/dy_t,

        G = sum_s sum_t d_t x_t^T / (number of documents, or sum_s T_s)   (o, i)
        Z = sum_s sum_t x_t x_t^T / n_tokens                              (i, i)
        Y = sum_s sum_t d_t d_t^T / n_tokens                              (o, o)

    over all tokens of the documents with T_s > 0; the others are not counted anywhere.

    `layers` name nn.Linear or Conv1D modules, each run once in a forward. A Conv1D
    stores its weight as (i, o), but its x and y are a linear layer's: G is (o, i).

    The model is left as it was: a copy is cast to float64 and put in eval mode. What
    its code casts to float32 by itself (Llama's RMSNorm) is float32 in the copy too.
    """
    if averaging not in ("samples", "tokens"):
        raise ValueError(f"averaging is 'samples' or 'tokens', not {averaging!r}")
    twin = copy.deepcopy(model).double().eval().requires_grad_(True)
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # x and y of the running document
    for name in layers:
        twin.get_submodule(name).register_forward_hook(partial(_remember, seen, name))

    xs: dict[str, list[Tensor]] = {name: [] for name in layers}  # each (T, i)
    ds: dict[str, list[Tensor]] = {name: [] for name in layers}  # each (T, o)
    loss_tokens: list[int] = []  # T_s of the counted documents
    for document in documents:
        ids, labels = torch.tensor(document["input_ids"]), torch.tensor(document["labels"])
        n_loss = int((labels[1:] != IGNORED_LABEL).sum())
        if n_loss == 0:
            continue
        loss_tokens.append(n_loss)
        seen.clear()
        logits = twin(input_ids=ids[None], use_cache=False).logits[0]
        loss = _document_loss(logits, labels, averaging)
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in layers])
        for name, d in zip(layers, gradients, strict=True):
            xs[name].append(seen[name][0].flatten(0, -2))
            ds[name].append(d.flatten(0, -2))
    if not loss_tokens:
        raise ValueError("no document has a loss token: every shifted label is -100")

    n_averaged = len(loss_tokens) if averaging == "samples" else sum(loss_tokens)
    statistics = {}
    for name in layers:
        x, d = torch.cat(xs[name]), torch.cat(ds[name])  # (n, i), (n, o)
        statistics[name] = OracleStatistics(
            grad=d.T @ x / n_averaged,
            input_cov=x.T @ x / len(x),
            output_fisher=d.T @ d / len(d),
            n_tokens=len(x),
            n_samples=len(loss_tokens),
            n_loss_tokens=sum(loss_tokens),
        )
    return statistics


def _remember(
    seen: dict[str, tuple[Tensor, Tensor]],
    name: str,
    _module: nn.Module,
    args: tuple[Tensor, ...],
    y: Tensor,
) -> None:
    """Forward hook: keep a layer's input, and its output with the graph behind it."""
    if name in seen:
        raise ValueError(f"{name} ran twice in one forward, which is not covered here")
    seen[name] = (args[0].detach(), y)


def _document_loss(logits: Tensor, labels: Tensor, averaging: Averaging) -> Tensor:
    """Mean or sum of -log p(labels[t + 1] | tokens to t); logits (T, vocabulary)."""
    targets = labels[1:]
    position = (targets != IGNORED_LABEL).nonzero().squeeze(1)  # (T_s)
    log_p = logits[:-1].double().log_softmax(dim=-1)
    entropies = -log_p[position, targets[position]]  # (T_s)
    return entropies.mean() if averaging == "samples" else entropies.sum()


def oracle_solve(
    grad: Tensor,
    input_cov: Tensor,
    output_fisher: Tensor,
    rank: int,
    *,
    population: float,
    variance_weight: float,
    damping: float,
    relative_damping: bool,
    gamma: float,
    normalize_step: bool,
    input_energy: float | None = None,
) -> OracleFactors:
    """LoRA-DA's Algorithm 1 from G (o, i), Z (i, i) and Y, full (o, o) or diagonal (o).

    With Z' = Z + damping I and Y' = Y + damping I, where `relative_damping` measures
    damping in units of each one's own mean diagonal, and yinv_o = [Y'^-1]_oo,

        D      = -Z'^-1 G^T diag(yinv) / sigma                                    (i, o)
        Omega  = variance_weight (sum yinv / population) / sigma^2 Z'^-1 - D D^T  (i, i)
        A0     = eigenvectors of Omega with the r smallest eigenvalues            (i, r)
        B0     = A0^T D                                                           (r, o)
        lora_B lora_A = (A0 B0)^T / gamma                                         (o, i)

    sigma is the largest singular value of D before the division with `normalize_step`,
    else 1.

    Both factors carry 1/sqrt(gamma), unless `input_energy` is given: then
    lora_A = a A0^T with tr(lora_A Z lora_A^T) = input_energy, Z undamped, and lora_B
    takes the rest of the scale, 1/(gamma a). The product is the same.
    """
    G, Z, Y = grad.double(), input_cov.double(), output_fisher.double()

    z_inverse = torch.linalg.inv(_damped(Z, damping, relative_damping))
    if Y.ndim == 1:
        yinv = 1 / (Y + damping * (Y.mean() if relative_damping else 1.0))
    else:
        yinv = torch.linalg.inv(_damped(Y, damping, relative_damping)).diagonal()

    D = -z_inverse @ G.T @ torch.diag(yinv)
    sigma = torch.linalg.matrix_norm(D, ord=2) if normalize_step else 1.0
    D = D / sigma

    variance = variance_weight * (yinv.sum() / population) / sigma**2 * z_inverse
    omega = variance - D @ D.T
    omega = (omega + omega.T) / 2  # rounding only: both terms are symmetric
    eigenvalues, eigenvectors = torch.linalg.eigh(omega)  # ascending
    A0 = eigenvectors[:, :rank]
    B0 = A0.T @ D

    a = 1 / math.sqrt(gamma)
    if input_energy is not None:
        a = math.sqrt(input_energy / torch.trace(A0.T @ Z @ A0).item())

    return OracleFactors(
        lora_A=a * A0.T,
        lora_B=B0.T / (gamma * a),
        subspace=A0,
        eigenvalues=eigenvalues,
        omega=omega,
        direction=D,
    )


def _damped(matrix: Tensor, damping: float, relative: bool) -> Tensor:
    """matrix + damping I, in units of the mean diagonal where `relative`."""
    unit = matrix.diagonal().mean() if relative else 1.0
    return matrix + damping * unit * torch.eye(len(matrix)).to(matrix)


def objective(omega: Tensor, basis: Tensor) -> Tensor:
    """tr(P^T Omega P), what A0 minimises over orthonormal P = `basis` (i, r)."""
    return torch.trace(basis.T @ omega @ basis)


def projector(basis: Tensor) -> Tensor:
    """The orthogonal projector (i, i) onto the span of `basis` (i, r), of full rank r.

    The columns need not be orthonormal, so `projector(lora_A.T)` is A0 A0^T.
    """
    q: Tensor = torch.linalg.qr(basis).Q  # (i, r)
    return q @ q.T
