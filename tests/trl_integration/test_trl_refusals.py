"""Training that LoRA-DA does not serve is refused before it begins, by the name of the setting that asks for it."""

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from models import adapter_weights, documents, lora
from transformers import TrainingArguments

pytest.importorskip("trl", reason="TRL is not installed")

import trl
from trainers import COMMON, FirstStep, base, same_bits, sentences, sft, tokenizer
from trl import DPOConfig, RewardConfig, SFTConfig

from lora_da.callback import refuse_unsupported
from lora_da.errors import LoraDAError
from trl_integration import LoraDAInitializer

NO_DISTRIBUTION = {"n_gpu": 1, "label_smoothing_factor": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


def made(kind, tmp_path, **keys):
    return kind(output_dir=str(tmp_path), use_cpu=True, report_to="none", **keys)


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig, RewardConfig])
def test_supervised_training_in_one_process_is_served(tmp_path, kind):
    refuse_unsupported(made(kind, tmp_path))
    refuse_unsupported(SimpleNamespace(**NO_DISTRIBUTION))


@pytest.mark.refused("preferences")
@pytest.mark.parametrize("name", ["DPOConfig", "KTOConfig", "GRPOConfig", "RLOOConfig"])
def test_preferences_and_rl_are_refused(tmp_path, name):
    with pytest.raises(LoraDAError, match=f"^{name}: LoRA-DA starts .* would differ from the policy at step 0"):
        refuse_unsupported(made(getattr(trl, name), tmp_path))


def trls_configs():
    """Module and name of everything in TRL that descends from `TrainingArguments`, read from its sources."""
    root = Path(trl.__file__).parent
    classes = []
    for path in root.rglob("*.py"):
        module = ".".join(("trl", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                classes.append((module, node.name, {ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases}))
    names, found = {"TrainingArguments"}, 0
    while found < len(names):
        found = len(names)
        names |= {name for _, name, bases in classes if bases & names}
    return sorted((module, name) for module, name, bases in classes if bases & names)


SERVED = ("SFTConfig", "RewardConfig")
TRAINERS = [(module, name) for module, name in trls_configs() if name not in (*SERVED, "_BaseConfig")]


def test_the_list_of_trls_configs_is_whole():
    assert {"DPO", "KTO", "GRPO", "RLOO", "ORPO", "CPO", "GKD"} <= {n.removesuffix("Config") for _, n in TRAINERS}
    assert {*SERVED} <= {name for _, name in trls_configs()}


@pytest.mark.refused("preferences")
@pytest.mark.filterwarnings("ignore")  # TRL's of its experimental parts
@pytest.mark.parametrize(("module", "name"), TRAINERS)
def test_every_other_trainer_of_trl_is_refused(module, name):
    kind = getattr(importlib.import_module(module), name)
    with pytest.raises(
        LoraDAError, match=f"^{name}: LoRA-DA starts .* use it for supervised fine-tuning or reward models$"
    ):
        refuse_unsupported(kind.__new__(kind))  # by what it is, before anything is read from it


def test_a_users_own_config_is_judged_by_trls(tmp_path):
    class MySFT(SFTConfig):
        pass

    class MyDPO(DPOConfig):
        pass

    refuse_unsupported(made(MySFT, tmp_path))
    with pytest.raises(LoraDAError, match="^DPOConfig: "):
        refuse_unsupported(made(MyDPO, tmp_path))


@pytest.mark.refused("label-smoothing", "other-losses")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "^label_smoothing_factor=0.1: .*set it to 0"),
        ({"loss_type": "dft"}, "^loss_type='dft': .*set 'nll'"),
    ],
)
def test_another_loss_is_refused(tmp_path, keys, message):
    with pytest.raises(LoraDAError, match=message):
        refuse_unsupported(made(SFTConfig, tmp_path, **keys))


@pytest.mark.refused("data-parallel")
def test_several_gpus_of_one_process_are_refused():
    with pytest.raises(LoraDAError, match=r"^one process trains on 2 GPUs \(nn.DataParallel\).*accelerate launch"):
        refuse_unsupported(SimpleNamespace(**{**NO_DISTRIBUTION, "n_gpu": 2}))


@pytest.mark.refused("tensor-parallel", "context-parallel")
@pytest.mark.parametrize(("size", "what"), [("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")])
def test_other_parallelism_than_over_samples_is_refused(size, what):
    """Accelerate's own config, as the training arguments hold it."""
    from accelerate.parallelism_config import ParallelismConfig

    refuse_unsupported(SimpleNamespace(**NO_DISTRIBUTION, parallelism_config=ParallelismConfig()))
    config = ParallelismConfig(**{size: 2})
    with pytest.raises(LoraDAError, match=f"^parallelism_config.{size}=2: {what} parallelism divides"):
        refuse_unsupported(SimpleNamespace(**NO_DISTRIBUTION, parallelism_config=config))


def test_sft_with_another_loss_stops_before_the_first_step(folder, tmp_path):
    first = FirstStep()
    trainer = sft(base(folder), Dataset.from_list(documents(8)), tmp_path, LoraDAInitializer(), first, loss_type="dft")
    before = adapter_weights(trainer.model)
    with pytest.raises(LoraDAError, match="^loss_type='dft'"):
        trainer.train()
    assert same_bits(adapter_weights(trainer.model), before)
    assert not first.adapter


def pairs():
    texts = [[" ".join(words) for words in sentences(8, seed=seed)] for seed in range(3)]
    return Dataset.from_list([{"prompt": f"{p} ", "chosen": c, "rejected": r} for p, c, r in zip(*texts, strict=True)])


def test_preference_training_stops_before_the_first_step(folder, tmp_path):
    first = FirstStep()
    trainer = trl.DPOTrainer(
        model=base(folder),
        args=DPOConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        peft_config=lora(),
        callbacks=[LoraDAInitializer(), first],
    )
    before = adapter_weights(trainer.model)
    with pytest.raises(LoraDAError, match="^DPOConfig: .*use it for supervised fine-tuning or reward models"):
        trainer.train()
    assert same_bits(adapter_weights(trainer.model), before)
    assert not first.adapter
