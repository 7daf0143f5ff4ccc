"""Liger's kernels, its fused head that returns a loss and no logits included, run on the CPU by Triton's interpreter."""

from __future__ import annotations

import pytest

pytest.importorskip("axolotl", reason="Axolotl is not installed")
pytest.importorskip("liger_kernel", reason="Liger is not installed")

from axolotl_runs import LAYERS, SAME, Project, difference, train

from axolotl_lora_da.bare_name import PLUGIN

pytestmark = [pytest.mark.axolotl, pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("liger"))


def interpreted(config: str) -> None:
    """`axolotl train` under Triton's interpreter, which lacks one function of the GPU's library."""
    import triton.language as language
    from triton.language.extra import libdevice

    libdevice.rsqrt = lambda x: 1 / language.sqrt(x)
    train(config)


@pytest.mark.parametrize("head", ["liger_fused_linear_cross_entropy", "liger_cross_entropy"])
def test_axolotls_liger_plugin(project, head, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when Triton is imported
    flags = {"liger_rope": True, "liger_rms_norm": True, "liger_glu_activation": True, head: True}
    plugins = [PLUGIN, "axolotl.integrations.liger.LigerPlugin"]
    run = project.run(head, interpreted, forked=False, plugins=plugins, **flags)
    assert run.lines() == [f"LoRA-DA: initialised {LAYERS} of {LAYERS}"]
    assert run.steps == 1
    assert difference(run.adapter(), project.by_hand()) < SAME
