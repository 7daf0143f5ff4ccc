"""The initial adapter in a folder: an ordinary PEFT adapter that holds what was written, or no folder at all."""

from __future__ import annotations

import json

import pytest
import torch
from caching import ROWS, adapted_llama, identical
from models import PROJECTIONS, QUANTISED, adapter_weights, pad, tiny_llama, tiny_quantized, with_lora
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lora_da import LoraDAConfig, LoraDAError, export_initial_adapter, initialize_lora_da_weights

# PEFT's: these bases lie in no folder and on no hub.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")

SMALL = LoraDAConfig(samples=8)
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lora_da_report.json"}


def export(model, output, config=SMALL, collate_fn=pad, **options):
    loader = DataLoader(ROWS, 4, collate_fn=collate_fn)
    return export_initial_adapter(model, loader, output, config, show_progress=False, **options)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.compat("export")
@pytest.mark.parametrize("kind", ["unquantised", *QUANTISED])
def test_the_adapter_is_what_the_initialisation_writes(tmp_path, kind):
    """Bit by bit, on the same base loaded again; and so are the logits."""
    if kind != "unquantised":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def base():
        return tiny_llama() if kind == "unquantised" else tiny_quantized(tmp_path / "base", **QUANTISED[kind])

    written, exported = with_lora(base()), with_lora(base())
    initialize_lora_da_weights(written, DataLoader(ROWS, 4, collate_fn=pad), SMALL, show_progress=False)
    report = export(exported, tmp_path / "out")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "out")
    assert report.initialized == 14
    assert identical(adapter_weights(loaded), adapter_weights(written)) and identical(
        adapter_weights(exported), adapter_weights(written)
    )
    assert names(tmp_path / "out") == FILES
    saved = json.loads((tmp_path / "out" / "lora_da_report.json").read_text())
    assert saved["initialized"] == 14 and len(saved["layers"]) == 14


def test_the_files_are_those_of_peft(tmp_path):
    model = adapted_llama()
    export(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "by PEFT")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "by PEFT" / name).read_bytes(), name
    assert names(tmp_path / "by PEFT") == FILES - {"lora_da_report.json"}


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_the_config_says_nothing_but_plain_lora(tmp_path, start):
    """What other trainers and servers refuse or do not know: variants, other starts, patterns, biases."""
    base = tiny_llama()
    base.config._name_or_path = base.name_or_path = "someone/a-model"
    export(with_lora(base, init_lora_weights=start), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    said |= {"base_model_name_or_path": "someone/a-model", "init_lora_weights": start}
    assert {name: config[name] for name in said} == said
    # PEFT's own reading of "all-linear": a list, of names or, in so small a model, of whole paths.
    ends = {name.split(".")[-1] for name in config["target_modules"]}
    assert ends == set(PROJECTIONS)
    plain_config = LoraConfig(r=4, lora_alpha=8).to_dict()
    own = {*said, "target_modules", "inference_mode", "peft_version", "auto_mapping"}
    assert {k: v for k, v in config.items() if k not in own} == {
        k: v for k, v in plain_config.items() if k not in own and k in config
    }


def test_a_named_adapter_alone_is_saved(tmp_path):
    model = adapted_llama()
    model.add_adapter("second", model.peft_config["default"])
    export(model, tmp_path / "out", adapter_name="second")
    assert names(tmp_path / "out") == {"README.md", "lora_da_report.json", "second"}
    saved = load_file(tmp_path / "out" / "second" / "adapter_model.safetensors")
    second = {n.replace(".second", ""): w for n, w in adapter_weights(model).items() if ".second" in n}
    assert identical(saved, second)


def refuse(rows):
    raise AssertionError("the data were read")


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("mine")
    model = adapted_llama()
    before = adapter_weights(model)
    with pytest.raises(LoraDAError, match=r"the output folder .*out is not empty; choose another one, or set"):
        export(model, tmp_path / "out", collate_fn=refuse)
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "mine"
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"adapter_config.json"}
    assert identical(adapter_weights(model), before)


def test_overwriting_replaces_files_of_the_same_name_only(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    model = adapted_llama()
    export(model, tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == {*FILES, "notes.txt"} and names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert identical(adapter_weights(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")), adapter_weights(model))


def test_folders_that_are_there_or_not(tmp_path, monkeypatch):
    """Empty, behind a link, or to be made with those above it; relative to where one is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for place in ("link", "a/b", "~/c"):
        monkeypatch.setenv("HOME", str(tmp_path))
        export(adapted_llama(), place)
    assert names(tmp_path / "empty") == names(tmp_path / "a" / "b") == names(tmp_path / "c") == FILES
    assert names(tmp_path) == {"empty", "link", "a", "c"}


@pytest.mark.parametrize("inside", ["", "further"])
def test_a_file_in_the_place_of_the_folder(tmp_path, inside):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(LoraDAError, match=r"the output folder .*out.* (is a file; choose|cannot be made: )"):
        export(adapted_llama(), tmp_path / "out" / inside, collate_fn=refuse)
    assert (tmp_path / "out").read_text() == "mine" and names(tmp_path) == {"out"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
@pytest.mark.parametrize("when", ["estimating", "saving"])
def test_an_error_leaves_no_folder(tmp_path, monkeypatch, when, error):
    model = adapted_llama()

    def fail(*args, **kwargs):
        raise error

    if when == "estimating":
        model.get_base_model().lm_head.register_forward_hook(fail)
    else:
        monkeypatch.setattr("lora_da.report.InitReport.save", fail)  # the last of the files
    with pytest.raises(error):
        export(model, tmp_path / "out")
    assert names(tmp_path) == set()


def test_a_trained_adapter_is_not_an_initial_one(tmp_path):
    model = adapted_llama()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = 1.0
    with pytest.raises(LoraDAError, match="no initial adapter to export: it carries trained weights; add a fresh one"):
        export(model, tmp_path / "out")
    assert names(tmp_path) == set()


def test_from_the_cache_it_is_the_same(tmp_path):
    config = LoraDAConfig(samples=8, cache_dir=str(tmp_path / "cache"))
    reports = [export(adapted_llama(seed), tmp_path / str(seed), config) for seed in range(2)]
    assert [report.from_cache for report in reports] == [False, True]
    first, second = ((tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in range(2))
    assert first == second
