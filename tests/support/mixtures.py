"""Tiny Llamas whose MLPs are mixtures of experts that are ordinary modules."""

from __future__ import annotations

import torch
from models import tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

EXPERTS, CHOSEN = 4, 2


class Expert(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    """Calls each expert with the rows routed to it, if there are any, as models of this kind do."""

    def __init__(self, hidden: int, inner: int, closed: int | None) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, inner) for _ in range(EXPERTS))
        self.closed = closed

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        if self.closed is not None:
            logits[:, self.closed] = -torch.inf
        weight, chosen = logits.softmax(-1).topk(CHOSEN)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, expert(rows[token]) * weight[token, place, None])
        return out.view_as(x)


def mixture(closed: int | None = None) -> LlamaForCausalLM:
    """No token goes to the expert `closed`."""
    model = tiny_llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in model.model.layers:
            layer.mlp = Mixture(32, 24, closed)
    return model
