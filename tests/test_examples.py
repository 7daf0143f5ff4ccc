"""The examples: the 8B configs pass Axolotl's own validation, and the instruction set is what it says it is."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.once

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yml"))
# A card of the Ada generation, as Axolotl describes the GPU it finds.
GPU = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_89"}
ROWS = 600
EQUATION = re.compile(r"((?:\d+ [-*+/] )+\d+) = (\d+)")


def make_instructions(path: Path, seed: int) -> str:
    command = [
        sys.executable,
        str(EXAMPLES / "make_instructions.py"),
        str(path),
        "--rows",
        str(ROWS),
        "--seed",
        str(seed),
    ]
    subprocess.run(command, check=True)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_instructions(tmp_path_factory.mktemp("data") / "rows.jsonl", seed=0)


def pairs(text: str) -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in text.splitlines()]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


def test_the_same_seed_gives_the_same_instructions(instructions, tmp_path):
    assert make_instructions(tmp_path / "again.jsonl", seed=0) == instructions
    assert make_instructions(tmp_path / "other.jsonl", seed=1) != instructions


def test_instructions_are_distinct_and_varied(instructions):
    rows = pairs(instructions)
    assert len(rows) == len({question for question, _ in rows}) == ROWS
    assert all(question.strip() and answer.strip() for question, answer in rows)
    openings = Counter(" ".join(question.split()[:2]) for question, _ in rows)
    assert len(openings) >= 20, openings
    assert max(openings.values()) < ROWS / 10, openings.most_common(3)
    assert len({answer for _, answer in rows}) > ROWS / 2


def test_equations_in_the_answers_hold(instructions):
    equations = [match for _, answer in pairs(instructions) for match in EQUATION.findall(answer)]
    assert len(equations) > ROWS / 20
    assert [left for left, right in equations if eval(left) != int(right)] == []  # digits and signs only, see EQUATION


def test_configs_are_there_for_every_card():
    cards = {f"qlora_8b_{gb}gb.yml" for gb in (12, 16, 24)}
    assert {"axolotl_qlora.yml", "qlora_qwen3_30b_a3b.yml"} | cards == {path.name for path in CONFIGS}


@pytest.mark.axolotl
@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="Axolotl is not installed")
@pytest.mark.filterwarnings("default")  # Axolotl's imports warn of much
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_passes_axolotls_validation(path):
    from axolotl.cli.config import plugin_set_cfg, prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = set(raw) - set(AxolotlInputConfig.model_fields) - {"lora_da"}
    assert not unknown, "Axolotl drops keys that it does not know without a word"

    config = DictDefault(raw)
    prepare_plugins(config)
    config = validate_config(config, capabilities=GPU, env_capabilities={"torch_version": "2.13.0"})
    plugin_set_cfg(config)
    assert config.adapter == "qlora" and config.load_in_4bit
    assert "lora_da" in raw["plugins"]
    assert (config.lora_da and config.lora_da.samples) == raw.get("lora_da", {}).get("samples")
