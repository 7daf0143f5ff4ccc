"""What Axolotl offers and LoRA-DA does not serve, read from the installed Axolotl so that nothing new slips by."""

from __future__ import annotations

import ast
import inspect

import pytest

pytest.importorskip("axolotl", reason="Axolotl is not installed")

from axolotl.cli.config import prepare_plugins
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.monkeypatch import lora_kernels
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import RLType
from axolotl_host import callbacks, fresh_manager, load, raw  # noqa: F401
from axolotl_runs import Project

from axolotl_lora_da.kernels import KERNEL_MODULES
from lora_da.errors import LoraDAError

pytestmark = [
    pytest.mark.axolotl,
    pytest.mark.usefixtures("fresh_manager"),
    pytest.mark.filterwarnings("default"),  # Axolotl's imports warn of much
]

PARALLEL = ["context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size", "expert_parallel_size"]


def refused(**keys):
    """The sentence that a run gets; a merge or a chat of the same config goes on."""
    cfg = raw(**keys)
    prepare_plugins(cfg)
    with pytest.raises(LoraDAError) as error:
        callbacks(cfg)
    return str(error.value)


@pytest.mark.refused("tensor-parallel", "context-parallel", "expert-parallel")
@pytest.mark.parametrize("key", PARALLEL)
def test_parts_of_layers_and_sequences_are_refused(key):
    assert refused(**{key: 2}).startswith(f"{key} is 2, which LoRA-DA cannot serve: each process would ")
    for size in (1, None):
        cfg = raw(**{key: size})
        prepare_plugins(cfg)
        assert len(callbacks(cfg)) == 1


@pytest.mark.refused("axolotl-rl")
@pytest.mark.parametrize("kind", [kind.value for kind in RLType])
def test_every_kind_of_rl_is_refused(kind):
    assert refused(rl=kind).startswith("rl is set, which LoRA-DA cannot serve: LoRA-DA estimates on the loss of super")


@pytest.mark.refused("axolotl-losses")
@pytest.mark.parametrize("key", ["use_eaft", "use_dft", "liger_use_token_scaling"])
def test_a_modified_loss_is_refused(key):
    assert refused(**{key: True}).endswith("would train another loss than its adapter was initialised for")


TRAINERS_WITH_A_LOSS = [
    "axolotl.core.trainers.mamba.AxolotlMambaTrainer",
    "axolotl.integrations.diffusion.trainer.DiffusionTrainer",
    "axolotl.integrations.kd.trainer.AxolotlKDTrainer",
]


@pytest.mark.refused("axolotl-losses")
@pytest.mark.parametrize("path", TRAINERS_WITH_A_LOSS)
def test_axolotls_trainers_with_a_loss_of_their_own_are_refused(path):
    module, name = path.rsplit(".", 1)
    pytest.importorskip(module, reason="this Axolotl has no such trainer")
    kind = getattr(__import__(module, fromlist=[name]), name)
    cfg = load()
    assert len(callbacks(cfg, AxolotlTrainer.__new__(AxolotlTrainer))) == 1
    with pytest.raises(LoraDAError, match="computes a loss of its own, which LoRA-DA cannot serve"):
        callbacks(cfg, kind.__new__(kind))


def test_every_kernel_flag_is_one_that_is_lifted():
    flags = {name for name in AxolotlInputConfig.model_fields if name.startswith("lora_") and name.endswith("_kernel")}
    assert flags == {"lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"}


def test_every_method_that_axolotls_kernels_bind_is_told():
    """By the slot it is bound to, and by the module of its function."""
    slots, functions = set(), set()
    for node in ast.walk(ast.parse(inspect.getsource(lora_kernels))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if ast.unparse(node.value.func) != "types.MethodType":
                continue
            (target,), function = node.targets, node.value.args[0]
            slots.add(target.attr)
            functions |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and n.id.startswith("apply_")}
    assert {"apply_qkv", "apply_o", "forward"} <= slots
    assert all(slot == "forward" or slot.startswith("apply_") for slot in slots)
    functions = {name for name in functions if callable(getattr(lora_kernels, name, None))}
    assert len(functions) > 3
    assert {getattr(lora_kernels, name).__module__ for name in functions} <= set(KERNEL_MODULES)
    assert {function.__module__ for function in lora_kernels.APPLY_FN_MAPPING.values()} <= set(KERNEL_MODULES)


@pytest.mark.slow
def test_a_run_that_is_refused_takes_no_step(tmp_path):
    run = Project(tmp_path).run("refused", use_eaft=True)
    assert run.error().startswith("lora_da.errors.LoraDAError: use_eaft is set, which LoRA-DA cannot serve: ")
    assert run.steps == 0
    assert not (run.output / "adapter_model.safetensors").exists()
