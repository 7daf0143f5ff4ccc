"""A file that is not just what was stored is not used: damaged, changed, foreign, or not fit for the adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from caching import adapted_llama, filled_by, identical, load, start
from logs import warnings_of
from models import adapter_weights
from safetensors import safe_open
from safetensors.torch import save_file

import lora_da.cache.store
from lora_da.adapter import find_adapter
from lora_da.cache.store import CacheEntry, Solution


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def filled(folder):
    return filled_by(adapted_llama(), folder)


def test_an_untouched_file_is_loaded(filled):
    solution = load(filled[0])
    assert solution is not None and len(solution.factors) == 14


@pytest.mark.compat("cache")
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_solved_anew_and_rewritten(folder, filled, share, caplog):
    path, expected = filled
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    model = adapted_llama()
    report, forwards = start(model, folder)
    assert forwards and not report.from_cache and identical(adapter_weights(model), expected)
    (warning,) = warnings_of(caplog)
    assert str(path) in warning and "will be written anew" in warning
    assert start(adapted_llama(), folder)[0].from_cache


def test_a_byte_changed_anywhere_is_seen(filled, caplog):
    path, _ = filled
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    entry, layers = CacheEntry(path.parent, path.stem), find_adapter(adapted_llama()).layers
    places = [*range(0, header, 37), *range(header, len(content), 211), len(content) - 1]
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert entry.load(layers) is None, (place, header)
    assert len(warnings_of(caplog)) == len(places) > 100
    path.write_bytes(content)
    assert load(path) is not None


def rewritten(path, tensors=None, **metadata):
    """The file with some of its content replaced, in a valid format."""
    with safe_open(path, "pt") as file:
        content, known = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(content | (tensors or {}), path, known | metadata)


def changed_report(path, **fields):
    with safe_open(path, "pt") as file:
        return json.dumps(json.loads(file.metadata()["report"]) | fields)


FOREIGN = {
    "a tensor without its checksum": lambda p: rewritten(p, {first_tensor(p): torch.ones(4, 32)}),
    "the report without its checksum": lambda p: rewritten(p, report=changed_report(p, loss=0.0)),
    "another key": lambda p: rewritten(p, key="0" * 64),
    "another program's": lambda p: save_file({"weight": torch.ones(2)}, p),
    "another program's, with metadata": lambda p: save_file({"weight": torch.ones(2)}, p, {"format": "pt"}),
    "text": lambda p: p.write_text("hello"),
    "nothing": lambda p: p.write_bytes(b""),
    "a long header": lambda p: p.write_bytes((2**62).to_bytes(8, "little") + p.read_bytes()[8:]),
}


def first_tensor(path):
    with safe_open(path, "pt") as file:
        return sorted(n for n in file.keys() if n.endswith("q_proj.lora_A"))[0]  # noqa: SIM118


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_not_used(folder, filled, kind, caplog):
    path, expected = filled
    FOREIGN[kind](path)
    model = adapted_llama()
    report, forwards = start(model, folder)
    assert forwards and not report.from_cache and identical(adapter_weights(model), expected)
    assert len(warnings_of(caplog)) == 1
    assert load(path) is not None


def test_a_file_of_another_run_under_this_name_is_not_used(folder, filled, caplog):
    path, _ = filled
    start(adapted_llama(), folder, damping=0.2)
    (other,) = set(folder.iterdir()) - {path}
    other.replace(path)
    assert not start(adapted_llama(), folder)[0].from_cache
    assert "written for something else" in warnings_of(caplog)[0]


def altered(solution, name, **values):
    """The solution with the factors of one layer changed; `drop` leaves it out."""
    factors = dict(solution.factors)
    pair = dict(zip("AB", factors.pop(name), strict=True)) | values
    return Solution(factors if values.get("drop") else {**factors, name: (pair["A"], pair["B"])}, solution.report)


@pytest.mark.parametrize("kind", ["nan", "inf", "shape", "dtype", "missing", "foreign layer", "odd report"])
def test_a_sound_file_that_does_not_fit_the_adapter_is_not_used(filled, kind, caplog):
    """Its checksum holds: what is written must not hang on that alone."""
    path, _ = filled
    solution = load(path)
    name = next(iter(solution.factors))
    a, b = solution.factors[name]
    wrong = {
        "nan": lambda: altered(solution, name, A=a * math.nan),
        "inf": lambda: altered(solution, name, B=b + math.inf),
        "shape": lambda: altered(solution, name, A=a[:3].clone(), B=b[:, :3].clone()),
        "dtype": lambda: altered(solution, name, A=a.bfloat16()),
        "missing": lambda: altered(solution, name, drop=True),
        "foreign layer": lambda: Solution(
            {**solution.factors, "../../../escape": (a.clone(), b.clone())}, solution.report
        ),
        "odd report": lambda: Solution(solution.factors, dataclasses.replace(solution.report, layers={"x": 3})),
    }[kind]()
    if kind == "odd report":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora_da.cache.store.dataclasses, "asdict", lambda report: {"layers": {"x": 3}})
            CacheEntry(path.parent, path.stem).store(wrong)
    else:
        CacheEntry(path.parent, path.stem).store(wrong)
    assert load(path) is None
    assert len(warnings_of(caplog)) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-310, 0.1 + 0.2])
def test_any_number_of_the_report_comes_back(filled, value):
    path, _ = filled
    solution = load(path)
    layers = {
        n: dataclasses.replace(r, condition=value, relative_step=value) for n, r in solution.report.layers.items()
    }
    report = dataclasses.replace(solution.report, loss=value, layers=layers)
    CacheEntry(path.parent, path.stem).store(Solution(solution.factors, report))
    found = load(path).report
    assert repr(found.loss) == repr(value)
    assert {repr(r.condition) for r in found.layers.values()} == {repr(value)}
    assert repr(found) == repr(report)


class Bomb:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return open, (str(self.flag), "w")


def test_a_pickle_is_not_opened(tmp_path, folder, filled):
    path, _ = filled
    flag = tmp_path / "flag"
    for content in (pickle.dumps(Bomb(flag)), pickle.dumps({"key": Bomb(flag)}, 0)):
        path.write_bytes(content)
        assert load(path) is None
    torch.save({"weight": Bomb(flag)}, path)
    assert load(path) is None
    assert not flag.exists()
    pickle.loads(pickle.dumps(Bomb(flag))).close()
    assert flag.exists()  # the charge was live


def test_no_unpickler_is_named():
    """Nor anything else that could run what is read."""
    source = Path(lora_da.cache.store.__file__).read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", source))
    assert "safe_open" in named and "torch.load" not in source
    assert not named & {"pickle", "Unpickler", "eval", "exec", "import_module", "__import__", "yaml", "marshal"}
