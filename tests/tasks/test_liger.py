"""Liger's kernels, also the fused head that returns a loss and no logits, run by Triton's interpreter on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tolerances import REBATCHED

pytest.importorskip("axolotl", reason="Axolotl is not installed")
pytest.importorskip("liger_kernel", reason="Liger is not installed")

from axolotl_runs import STARTED, Project, difference, train
from datasets import Dataset
from models import documents
from settings import as_solved
from trainers import base, sft

from axolotl_lora_da.bare_name import PLUGIN
from trl_integration import LoraDAInitializer

pytestmark = [pytest.mark.axolotl, pytest.mark.slow, pytest.mark.filterwarnings("default")]


ROWS, SAMPLES = documents(6), 4  # each token is some hundred programs to the interpreter


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    found = Project(tmp_path_factory.mktemp("liger"))
    found.rows("rows", ROWS)
    return found


def interpreted(config: str) -> None:
    """`axolotl train` under Triton's interpreter, which lacks one function of the GPU's library."""
    _lend_rsqrt()
    train(config)


def _lend_rsqrt() -> None:
    import triton.language as language
    from triton.language.extra import libdevice

    libdevice.rsqrt = lambda x: 1 / language.sqrt(x)


def sft_interpreted(config: str) -> None:
    """TRL's trainer with `use_liger_kernel`, on the same rows."""
    folder = Path(config).parent
    _lend_rsqrt()
    trainer = sft(
        base(folder / "base"),
        Dataset.from_list(ROWS),
        Path(config).with_suffix(""),
        LoraDAInitializer(as_solved(samples=SAMPLES)),
        use_liger_kernel=True,
        bf16=False,
        learning_rate=0.0,
    )
    trainer.train()
    trainer.save_model()


@pytest.mark.compat("axolotl-liger")
@pytest.mark.parametrize("head", ["liger_fused_linear_cross_entropy", "liger_cross_entropy"])
def test_axolotls_liger_plugin(project, head, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when Triton is imported
    flags = {"liger_rope": True, "liger_rms_norm": True, "liger_glu_activation": True, head: True}
    plugins = [PLUGIN, "axolotl.integrations.liger.LigerPlugin"]
    settings = {"plugins": plugins, "lora_da": {"samples": SAMPLES, "first_step": "gamma"}, **flags}
    run = project.run(head, interpreted, forked=False, **settings)
    assert run.lines() == [STARTED]
    assert run.steps == 1
    assert difference(run.adapter(), project.by_hand(ROWS, SAMPLES)) < REBATCHED


@pytest.mark.compat("liger")
def test_trls_use_liger_kernel(project, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = project.run("trl", sft_interpreted, forked=False)
    assert run.lines() == [STARTED]
    assert run.steps == 1
    assert difference(run.adapter(), project.by_hand(ROWS, SAMPLES)) < REBATCHED
