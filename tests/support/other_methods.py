"""Tiny runs of the methods beside LoRA-DA, and what their oracles make of the same documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collecting import distance
from method_oracles import ShiftProblem, oracle_filet, oracle_lora_ga, oracle_lora_one
from models import PREFIX, documents, packed, pad
from oracle import OracleStatistics, projector
from peft import PeftModel
from planning import Way
from tolerances import FLOAT32, TURNED

from lora_da import LoraDAConfig, initialize_lora_da_weights
from lora_da.adapter import find_adapter
from lora_da.collect import Planner, make_plan

METHODS = ("filet", "cntlora", "lora_one", "lora_ga")
STARTS_AT_THE_BASE = ("filet", "cntlora", "lora_ga")
TAKEN = {  # grad, input_cov, output_fisher
    "filet": (False, True, True),
    "cntlora": (False, True, False),
    "lora_one": (True, False, False),
    "lora_ga": (True, False, False),
}
RANK = 4  # of `models.with_lora`
ROWS = documents((9, 14, 6, 11, 13, 8, 15, 12))
BATCHES = [pad(ROWS[:4]), packed(ROWS[4:])]
WAYS = {
    "one pass": Way(),
    "a segment for each block": Way(cuts=2),
    "2 segments in 3 parts": Way(cuts=2, parts=3),
    "3 passes": Way(parts=3, cut=False),
}
every_method = pytest.mark.parametrize("method", METHODS)


def start(model: PeftModel, method: Any, plan: Planner = make_plan, **settings: Any) -> Any:
    config = LoraDAConfig(method=method, samples=len(ROWS), **settings)
    return initialize_lora_da_weights(model, BATCHES, config, show_progress=False, plan=plan)


def factors(model: PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    layers = find_adapter(model).layers
    return {a.name.removeprefix(PREFIX): (a.lora_A.detach().double(), a.lora_B.detach().double()) for a in layers}


def check_factors(
    found: tuple[torch.Tensor, torch.Tensor], seen: OracleStatistics, weight: torch.Tensor, method: str
) -> None:
    lora_A, lora_B = found
    energy = RANK * seen.input_cov.trace() / (3 * lora_A.shape[1])
    assert (method in STARTS_AT_THE_BASE) == (not lora_B.any())
    if method == "lora_one":
        a, b = oracle_lora_one(seen.grad, RANK, 128.0)
        assert distance(lora_B @ lora_A, b @ a) <= TURNED
        assert distance(lora_A.norm(dim=1), a.norm(dim=1)) <= TURNED
    elif method == "lora_ga":
        a = oracle_lora_ga(seen.grad, RANK, 16.0)
        assert distance(projector(lora_A.T), projector(a.T)) <= TURNED
        assert distance(lora_A.norm(), a.norm()) <= FLOAT32
    else:
        if method == "filet":
            rows = oracle_filet(weight, seen.input_cov, seen.output_fisher, RANK)[1].T
        else:  # on tokens with that very second moment
            values, vectors = torch.linalg.eigh(seen.input_cov)
            root = values.clamp_min(0).sqrt().unsqueeze(1) * vectors.T
            x = torch.cat([root, torch.zeros_like(root)]) * (2 * len(root)) ** 0.5
            rows = torch.linalg.svd(ShiftProblem(x, weight.double(), 0.1).solve(RANK), full_matrices=False).Vh[:RANK]
        assert distance(projector(lora_A.T), projector(rows.T)) <= TURNED
        assert distance(torch.trace(lora_A @ seen.input_cov @ lora_A.T), energy) <= FLOAT32
