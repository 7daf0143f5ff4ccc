"""The README is true: its snippets run, its tables are the code's, its commands and links exist."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from models import documents, pad, tiny_llama, with_lora
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from lora_da.config import PRESETS, LoraDAConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippet(language: str, containing: str) -> str:
    found = [s for s in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in s]
    assert len(found) == 1, f"{len(found)} {language} snippets contain {containing!r}"
    return found[0]


ROWS = documents((9, 8, 7, 6))


@pytest.mark.compat("peft-call")
def test_peft_snippet_runs() -> None:
    loader = torch.utils.data.DataLoader(ROWS, batch_size=2, collate_fn=pad)
    names = {"peft_model": with_lora(tiny_llama()), "dataloader": loader}
    exec(snippet("python", "initialize_lora_da_weights").replace("samples=256", "samples=4"), names)
    assert names["report"].initialized == 14


def test_trl_snippet_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Trainer stands in for SFTTrainer, which has tests of its own: the snippet is about the callback."""

    def sft_trainer(model, peft_config, **kwargs):
        return Trainer(model=with_lora(model), data_collator=pad, **kwargs)

    args = TrainingArguments(tmp_path, max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
    names = {
        "SFTTrainer": sft_trainer,
        "model": tiny_llama(),
        "args": args,
        "train_dataset": ROWS,
        "peft_config": LoraConfig(),
    }
    exec(snippet("python", "LoraDAInitializer"), names)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("LoRA-DA: ")]
    pattern = re.search(r"```\n(LoRA-DA: .*)\n```", README)[1]
    assert len(shown) == 1
    assert re.sub(r"[\d.,]+", "#", shown[0]) == re.sub(r"[\d.,]+", "#", pattern)


def test_yaml_snippet_is_all_it_takes() -> None:
    assert yaml.safe_load(snippet("yaml", "plugins")) == {"plugins": ["lora_da"]}


def table(heading: str) -> list[list[str]]:
    lines = README[README.index(heading) :].splitlines()
    body = lines[2 : next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in body]


def test_option_table_names_every_field_and_default() -> None:
    options = {row[0]: row[1] for row in table("| field | default |")}
    assert list(options) == [f.name for f in dataclasses.fields(LoraDAConfig)]
    for field in dataclasses.fields(LoraDAConfig):
        if field.default is not None:
            assert options[field.name] == str(field.default)


def test_preset_table_is_the_code() -> None:
    presets = {row[0].split("`")[0]: row[1:] for row in table("| preset | `averaging` |")}
    assert list(presets) == list(PRESETS)
    for name, preset in PRESETS.items():
        averaging, variance, damping, gamma, full, step, scale = presets[name]
        assert averaging == preset.averaging
        assert [float(variance), float(gamma), int(full)] == [
            preset.variance_weight,
            preset.gamma,
            preset.full_fisher_up_to,
        ]
        assert float(damping.split(" ")[0]) == preset.damping
        assert ("mean diagonal" in damping) == preset.relative_damping
        assert (step == "σ(D) = 1") == preset.normalize_step
        assert ("tr(A Z Aᵀ)" in scale) == preset.match_input_energy


def test_links_and_make_targets_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
