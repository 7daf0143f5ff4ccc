"""Keep the names that people import, the options they write and the fields they read.

The lists are written out, not read from the code: who changes one on purpose changes it here too.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
import re
from pathlib import Path

import pytest

import axolotl_lora_da
import lora_da
from axolotl_lora_da import bare_name
from axolotl_lora_da.settings import BLOCK
from benchmarks.quality.results import Result, read
from lora_da.__main__ import main
from lora_da.config import PRESETS, LoraDAConfig, Preset
from lora_da.report import REPORT_FILE, InitReport, LayerReport

pytestmark = pytest.mark.once

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results" / "quality").glob("*.jsonl"))

PUBLIC = """
    InitReport LoraDAConfig LoraDAError __version__ export_initial_adapter initialize_lora_da_weights
""".split()

# By place, and what each takes.
CALLED = {
    "lora_da.initialize_lora_da_weights": (
        "peft_model dataloader config adapter_name show_progress reward plan step_rows offloading learning_rate"
    ),
    "lora_da.export_initial_adapter": (
        "peft_model dataloader output config adapter_name overwrite show_progress reward learning_rate"
    ),
    "lora_da.tasks.RewardLoss": "center_coefficient",
    "lora_da.callback.LoraDACallback": "config during plan offloading",
    "trl_integration.LoraDAInitializer": "config during plan offloading",
}

OPTIONS = """
    method preset samples seed population_size averaging variance_weight damping gamma first_step chosen_rows
    match_rate full_fisher_up_to memory_budget cache_dir
""".split()
METHODS = "lora_da filet cntlora lora_one lora_ga".split()
PRESET = """
    averaging variance_weight damping gamma full_fisher_up_to relative_damping normalize_step match_input_energy
    first_step chosen_rows match_rate
""".split()

COMMAND = """
    --model --data --check --output --overwrite --rank --alpha --target-modules --target-parameters --load-in-4bit
    --load-in-8bit --samples --max-length --method --preset --first-step --gamma --chosen-rows --learning-rate
    --cache-dir --device --dtype
""".split()

REPORT = """
    initialized targeted failed left samples sample_unit tokens loss_tokens population_size loss gradient_norms seconds
    steps peak_memory_gib
    memory_of plan forecast timings settings layers first_step rate data notes skipped from_cache
""".split()
SETTINGS = [*OPTIONS, "relative_damping", "normalize_step", "match_input_energy"]
LAYER = """
    rank tokens bias_captured damping_input damping_output full_fisher condition residual relative_step
    fisher_length
""".split()

LINE = """
    cell train_loss heldout final base_loss accuracy diverged own_base init_seconds train_seconds from_cache
    peak_memory_gib memory_of initialized prediction environment
""".split()
CELL = """
    task split data start method settings numbers rank rate seed steps batch length heldout_rows curve_rows init_samples
    model base
""".split()
# What lines of before have not, and what their cells are then read with.
YOUNGER_LINE = "full step_seconds exact_match".split()
YOUNGEST_LINE = ["movement"]
YOUNGER_CELL = {"adapters": "bf16", "alpha_over_r": 2.0, "full_at": (), "exact_match_rows": 0}
ENVIRONMENT = "versions hardware command commit date".split()


def test_the_package_has_its_names() -> None:
    assert sorted(lora_da.__all__) == sorted(PUBLIC)
    assert all(getattr(lora_da, name) for name in PUBLIC)
    assert lora_da.LoraDAConfig is LoraDAConfig and lora_da.InitReport is InitReport
    assert issubclass(lora_da.LoraDAError, Exception)


@pytest.mark.parametrize("place", CALLED)
def test_what_is_called_is_in_its_place(place: str) -> None:
    assert list(inspect.signature(pkgutil.resolve_name(place)).parameters) == CALLED[place].split()


def test_the_options_are_those_of_the_block() -> None:
    assert BLOCK == "lora_da"
    assert [field.name for field in dataclasses.fields(LoraDAConfig)] == OPTIONS
    assert [LoraDAConfig(method=method).method for method in METHODS] == METHODS
    with pytest.raises(lora_da.LoraDAError, match=rf"set one of {', '.join(METHODS)}$"):
        LoraDAConfig(method="another")


def test_presets_are_chosen_by_name_or_made() -> None:
    assert list(PRESETS) == ["default", "reference", "paper"]
    assert [field.name for field in dataclasses.fields(Preset)] == PRESET
    own = dataclasses.replace(PRESETS["paper"], gamma=2.0)
    assert LoraDAConfig(preset=own).settings()["gamma"] == 2.0


def test_the_command_takes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE) == COMMAND


def test_the_report_has_its_keys(tmp_path: Path) -> None:
    layer = LayerReport(**dict.fromkeys(LAYER))
    report = InitReport(settings=LoraDAConfig().settings(), layers={"layer": layer})
    saved = json.loads(report.save(tmp_path).read_text(encoding="utf-8"))
    assert REPORT_FILE == "lora_da_report.json" and (tmp_path / REPORT_FILE).exists()
    assert list(saved) == [field.name for field in dataclasses.fields(InitReport)] == REPORT
    assert list(saved["layers"]["layer"]) == [field.name for field in dataclasses.fields(LayerReport)] == LAYER
    assert list(saved["settings"]) == SETTINGS


def test_the_sweeps_are_on_file() -> None:
    assert {path.stem for path in RESULTS} >= set("candidates two_cores two_cores_arc two_cores_test".split())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_on_file_have_their_keys(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        young = CELL + list(YOUNGER_CELL)
        known = (LINE, CELL), (LINE + YOUNGER_LINE, young), (LINE + YOUNGER_LINE + YOUNGEST_LINE, young)
        assert (list(line), list(line["cell"])) in known and list(line["environment"]) == ENVIRONMENT
    finished = read([path])
    assert (len(finished.results), finished.notes) == (len(lines), ())
    assert [field.name for field in dataclasses.fields(Result)] == LINE + YOUNGER_LINE + YOUNGEST_LINE
    cells = [YOUNGER_CELL | line["cell"] for line in lines]
    expected = [{**cell, "full_at": tuple(cell["full_at"])} for cell in cells]
    assert [dataclasses.asdict(result.cell) for result in finished.results] == expected


@pytest.mark.axolotl
@pytest.mark.filterwarnings("default")  # Axolotl's imports warn of much
def test_the_plugin_has_two_names() -> None:
    base = pytest.importorskip("axolotl.integrations.base", reason="Axolotl is not installed")
    bare_name.install()
    for name in ("lora_da", "axolotl_lora_da.LoraDAPlugin"):
        assert type(base.load_plugin(name)) is axolotl_lora_da.LoraDAPlugin
