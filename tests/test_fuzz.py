"""Random configurations of what the table calls tested: each starts where the oracle says, or is refused by its row.

`LORA_DA_FUZZ` sets how many are drawn, and from where is then left to chance; `make fuzz` draws two thousand.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("trl", reason="TRL is not installed")

from fuzz import SENTENCES, TRAINERS, Configuration, configurations, twin
from hypothesis import HealthCheck, given, note, settings
from judge import truth, worst_start
from table import keys_of, sources, states

from lora_da import LoraDAError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ASKED = os.environ.get("LORA_DA_FUZZ")
EXAMPLES = int(ASKED or 150)
MOSTLY = 0.8
# A float32 model and sums, 2e-5 off; the damped Z multiplies that by its condition number, 10 · i = 640 at most and
# rarely half. Adapters in bfloat16 are off by their own rounding.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2e-2}
STATES = states(map(keys_of, sources().values()))


def outcome(configuration: Configuration, output: Path) -> str:
    """`started`, or the row that refuses it; anything else is an error."""
    refusal = configuration.refusal if STATES.get(configuration.refusal or "") == "refused" else None
    base = configuration.base()
    dense = twin(base, configuration)
    model = configuration.adapter(base)
    if refusal is not None:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(LoraDAError, match=SENTENCES[refusal]):
            configuration.start(model, output)
        # SFTTrainer casts adapters of a 4-bit base to bfloat16 when it is made
        assert all(torch.equal(p, before[name].to(p.dtype)) for name, p in model.named_parameters())
        return refusal
    report = configuration.start(model, output)
    assert report.initialized == report.targeted and report.skipped is None
    counted = configuration.counted()
    assert (report.samples, report.tokens) == (len(counted), sum(len(row["input_ids"]) for row in counted))
    dtype = next(p.dtype for name, p in model.named_parameters() if "lora_" in name)
    gaussian = dict(configuration.lora).get("init_lora_weights") == "gaussian"
    error = worst_start(model, report, truth(dense, counted, report.layers), configuration.count, gaussian=gaussian)
    note(f"off by {error:.1e}")
    assert error <= TOLERANCE[dtype]
    return "started"


def test_random_configurations(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    counts: Counter[str] = Counter()
    drawn: set[str] = set()

    @settings(
        max_examples=EXAMPLES,
        derandomize=ASKED is None,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(configurations())
    def run(configuration: Configuration) -> None:
        drawn.update(configuration.rows)
        counts[outcome(configuration, tmp_path)] += 1

    run()
    record_property("random configurations", f"{dict(counts.most_common())}; rows: {', '.join(sorted(drawn))}")
    assert counts["started"] >= MOSTLY * counts.total()
    assert {STATES[row] for row in drawn} == {"tested"}


def test_every_refusal_that_is_drawn_has_a_row() -> None:
    assert {row for rows in TRAINERS.values() for row in rows} == SENTENCES.keys()
    assert all(row in STATES for row in SENTENCES)
