"""Snippets run: all that README and docs show."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from models import documents, few_tokens, pad, tiny_llama, with_lora
from pages import Fence, commands, fences, pages
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from words import as_lines, tokenizer

from axolotl_lora_da.settings import read_settings
from lora_da.__main__ import main

SHOWN = fences(pages())
RUN: set[Fence] = set()
THE_COMMAND = "python -m lora_da "


def runs(page: str, language: str, containing: str = "", argument: str = "code") -> pytest.MarkDecorator:
    """Give a test the one snippet of a page with these words."""
    found = [fence for fence in SHOWN if (fence.page, fence.language) == (page, language) and containing in fence.code]
    assert len(found) == 1, f"{page}: {len(found)} {language} snippets contain {containing!r}"
    RUN.update(found)
    return pytest.mark.parametrize(argument, [found[0].code], ids=[page])


def not_run(shown: list[Fence]) -> list[Fence]:
    """Snippets that no test takes; what is typed into a shell is looked at line by line instead."""
    return [fence for fence in shown if fence.language != "bash" and fence not in RUN]


ROWS = few_tokens(documents((9, 8, 7, 6, 9, 8, 7, 6)))


def own_loop() -> dict:
    """The names that a loop of one's own has."""
    loader = torch.utils.data.DataLoader(ROWS, batch_size=2, collate_fn=pad)
    return {"peft_model": with_lora(tiny_llama()), "dataloader": loader}


@pytest.mark.compat("peft-call")
@runs("README.md", "python", "initialize_lora_da_weights")
def test_peft_snippet_runs(code: str) -> None:
    names = own_loop()
    exec(code, names)
    assert names["report"].initialized == 14


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT's: the base is in no folder
@runs("docs/starts.md", "python")
def test_export_snippet_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = own_loop()
    exec(code, names)
    assert names["report"].initialized == 14
    assert (tmp_path / "initial-adapter" / "adapter_model.safetensors").exists()


@runs("README.md", "python", "LoraDAInitializer")
@runs("README.md", "", argument="line")
def test_trl_snippet_runs(code: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Trainer stands in for SFTTrainer, which has tests of its own: the snippet is about the callback."""

    def sft_trainer(model, peft_config, **kwargs):
        return Trainer(model=with_lora(model), data_collator=pad, **kwargs)

    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(tmp_path, max_steps=1, learning_rate=1.0, **quiet)  # large enough, as the demo's is
    names = {
        "SFTTrainer": sft_trainer,
        "model": tiny_llama(),
        "args": args,
        "train_dataset": ROWS,
        "peft_config": LoraConfig(),
    }
    exec(code, names)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("LoRA-DA: ")]
    assert [re.sub(r"[\d.,]+", "#", one) for one in shown] == re.sub(r"[\d.,]+", "#", line.strip()).splitlines()


@runs("README.md", "yaml")
def test_yaml_snippet_is_all_it_takes(code: str) -> None:
    assert yaml.safe_load(code) == {"plugins": ["lora_da"]}


@runs("docs/axolotl.md", "yaml")
def test_yaml_block_is_read(code: str) -> None:
    config = yaml.safe_load(code)
    assert config["plugins"] == ["lora_da"]
    settings = read_settings(config)
    assert {name: getattr(settings, name) for name in config["lora_da"]} == config["lora_da"]


@runs("docs/axolotl.md", "yaml")
@pytest.mark.axolotl
@pytest.mark.skipif(importlib.util.find_spec("pydantic") is None, reason="pydantic comes with Axolotl")
def test_yaml_block_passes_the_schema(code: str) -> None:
    from axolotl_lora_da.args import LoraDAArgs

    config = yaml.safe_load(code)
    assert LoraDAArgs(lora_da=config["lora_da"]).lora_da == read_settings(config)


def test_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.chdir(tmp_path)
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained("path/to/model")
    tokenizer().save_pretrained("path/to/model")
    as_lines(tmp_path / "rows.jsonl", [{"prompt": "a b c", "completion": " d e"}] * 4)
    typed = [line for _, line in commands(SHOWN) if line.startswith(THE_COMMAND)]
    assert len(typed) == 2
    for line in typed:
        assert main([*shlex.split(line.removeprefix(THE_COMMAND)), "--device", "cpu"]) == 0
    assert (tmp_path / "initial-adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "lora_da_check.json").exists()


@pytest.mark.once
def test_every_snippet_is_run() -> None:
    assert not_run(SHOWN) == []


@pytest.mark.once
@pytest.mark.parametrize("language", ["python", "yaml", "json", ""])
def test_a_snippet_that_nothing_runs_is_found(language: str) -> None:
    planted = fences({"docs/new.md": f"Text.\n\n```{language}\nlora_da.initialize()\n```\n"})
    assert not_run([*SHOWN, *planted]) == planted != []


@pytest.mark.once
@pytest.mark.parametrize("text", ["- so:\n\n  ```python\n  x\n  ```\n", "```python\nx\n", "```python title\nx\n```\n"])
def test_a_fence_that_would_be_overlooked_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"docs/new\.md: a fence begins"):
        fences({"docs/new.md": text})
