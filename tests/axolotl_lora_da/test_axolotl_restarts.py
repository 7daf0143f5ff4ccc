"""Axolotl runs that begin with an adapter that is no longer, or is still, untrained; each trained for real."""

from __future__ import annotations

import contextlib
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tolerances import REBATCHED

pytest.importorskip("axolotl", reason="Axolotl is not installed")

import torch
from axolotl_runs import STARTED, Project, difference, train
from models import with_lora
from trainers import same_bits

pytestmark = [pytest.mark.axolotl, pytest.mark.slow, pytest.mark.filterwarnings("default")]

LEFT = "LoRA-DA: left the adapter as it is: "
LEARNING = {"learning_rate": 1e-2, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("axolotl"))


@pytest.fixture(scope="module")
def expected(project):
    return project.by_hand()


@pytest.fixture(scope="module")
def trained(project, expected):
    """A run of two steps with its checkpoints."""
    run = project.run("trained", **LEARNING, max_steps=2, save_strategy="steps", save_steps=1)
    assert run.lines() == [STARTED]
    assert difference(run.adapter(), expected) > REBATCHED
    return run


@pytest.mark.compat("axolotl-model-dir", "trained-adapter")
def test_a_trained_adapter_goes_on(project, trained):
    run = project.run("continued", lora_model_dir=str(trained.output))
    assert run.lines() == [f"{LEFT}it carries trained weights"]
    assert same_bits(run.adapter(), trained.adapter())
    assert not (run.output / "lora_da_report.json").exists()


@pytest.mark.compat("axolotl-model-dir")
def test_a_saved_adapter_without_training_is_initialised(project, expected):
    with_lora(project.base(), seed=5).save_pretrained(project.folder / "fresh")
    run = project.run("from_fresh", lora_model_dir=str(project.folder / "fresh"))
    assert run.lines() == [STARTED]
    assert difference(run.adapter(), expected) < REBATCHED


@pytest.mark.compat("axolotl-resume", "resumed")
@pytest.mark.parametrize("how", ["resume_from_checkpoint", "auto_resume_from_checkpoints"])
def test_a_resumed_run_goes_on(project, trained, how, tmp_path):
    """From the first checkpoint to the adapter of the run that was not interrupted."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "checkpoint-1").symlink_to(trained.output / "checkpoint-1")
    key = {how: str(output / "checkpoint-1") if how == "resume_from_checkpoint" else True}
    run = project.run(how, output_dir=str(output), **LEARNING, max_steps=2, **key)
    run.output = output
    assert run.lines() == [f"{LEFT}training resumes at step 1"]
    assert run.steps == 1
    assert same_bits(run.adapter(), trained.adapter())


@pytest.mark.compat("axolotl-relora")
def test_relora_is_initialised_once(project, expected):
    """The first adapter is LoRA-DA's; after the restart PEFT's init stands, as the warning says."""
    run = project.run("relora", relora=True, jagged_restart_steps=2, max_steps=3)
    assert run.lines() == [STARTED]
    assert "relora: LoRA-DA initialises the first adapter only" in run.text
    assert run.steps == 3
    assert difference(run.adapter("checkpoint-2/adapter"), expected) < REBATCHED


def out_of_memory_at_the_first_step(config: str) -> None:
    """What a GPU says where a batch is too large for it."""
    from transformers import Trainer

    step, calls = Trainer.training_step, []

    def once_too_large(self, *args, **kwargs):
        calls.append(self._train_batch_size)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, *args, **kwargs)

    Trainer.training_step = once_too_large
    train(config)
    print("batch sizes", calls)


@pytest.mark.compat("axolotl-find-batch-size")
def test_auto_find_batch_size_starts_the_adapter_once(project, expected):
    run = project.run("smaller", out_of_memory_at_the_first_step, auto_find_batch_size=True)
    assert run.lines() == [STARTED, f"{LEFT}it carries trained weights"]
    assert "batch sizes [2, 1]" in run.text
    assert difference(run.adapter(), expected) < REBATCHED


def ray_driver(config: str) -> None:
    """`axolotl train` with `use_ray: true` up to where Ray takes over: its config, as it travels, is put aside."""

    class TorchTrainer:
        def __init__(self, function, train_loop_config, **kwargs):
            self.job = function.__name__, train_loop_config

        def fit(self):
            Path(config).with_suffix(".ray").write_bytes(pickle.dumps(self.job))

    modules = {name: ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch")}
    modules["ray.train"].RunConfig = modules["ray.train"].ScalingConfig = contextlib.nullcontext
    modules["ray.train"].ScalingConfig = lambda **kwargs: kwargs
    modules["ray.train"].RunConfig = lambda **kwargs: kwargs
    modules["ray.train.torch"].TorchTrainer = TorchTrainer
    sys.modules.update(modules)
    train(config)


def ray_worker(config: str) -> None:
    """What Ray runs in a process of its own, where no plugin has been registered."""
    from axolotl.cli import train as command

    name, job = pickle.loads(Path(config).with_suffix(".ray").read_bytes())
    getattr(command, name)(job)


@pytest.mark.compat("axolotl-ray")
def test_a_ray_worker_registers_the_plugin_again(project, expected):
    block = {"samples": 16, "damping": 0.1, "first_step": "gamma"}
    ray = {"use_ray": True, "ray_num_workers": 1, "lora_da": block}
    driver = project.run("ray", ray_driver, **ray)
    assert driver.lines() == [] and driver.steps == 0
    worker = project.run("ray", ray_worker, **ray)
    assert worker.lines() == [STARTED]
    assert worker.steps == 1
    assert difference(worker.adapter(), expected) < REBATCHED
