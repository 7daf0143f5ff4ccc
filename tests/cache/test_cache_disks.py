"""Disks, places and neighbours: whatever they do to the cache, the run goes on."""

from __future__ import annotations

import builtins
import errno
import os
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from caching import ROWS, adapted_llama, filled_by, identical, load, start
from faults import poison
from logs import warnings_of
from models import LAYERS, adapter_weights, pad
from picture import differences, picture
from torch.utils.data import DataLoader

import lora_da.cache.store
from lora_da import LoraDAError
from lora_da.adapter import find_adapter
from lora_da.cache.store import CacheEntry


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def filled(folder):
    return filled_by(adapted_llama(), folder)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """Takes a part of what is written."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content):
        self._file.write(content[: len(content) // 2])
        no_space()


def opened_full(path, mode="r", **options):
    return FullFile(builtins.open(path, mode, **options))


FULL = {
    "open": lambda patch: patch.setattr(lora_da.cache.store, "open", no_space, raising=False),
    "write": lambda patch: patch.setattr(lora_da.cache.store, "open", opened_full, raising=False),
    "fsync": lambda patch: patch.setattr(lora_da.cache.store.os, "fsync", no_space),
    "replace": lambda patch: patch.setattr(lora_da.cache.store.os, "replace", no_space),
}


@pytest.mark.parametrize("when", FULL)
def test_a_full_disk_costs_the_cache_and_not_the_run(folder, when, caplog):
    expected, model = adapted_llama(), adapted_llama()
    start(expected, None)
    with pytest.MonkeyPatch.context() as patch:
        FULL[when](patch)
        report, _ = start(model, folder)
    assert report.initialized == 14 and identical(adapter_weights(model), adapter_weights(expected))
    (warning,) = warnings_of(caplog)
    assert "is not kept" in warning and os.strerror(errno.ENOSPC) in warning
    assert list(folder.iterdir()) == []


def test_a_file_that_may_not_grow_so_large(folder, caplog):
    """The system's own refusal, in the middle of a write."""
    model = adapted_llama()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        report, _ = start(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert report.initialized == 14 and list(folder.iterdir()) == []
    assert os.strerror(errno.EFBIG) in warnings_of(caplog)[0]


def test_what_was_kept_stays_when_the_disk_is_full(filled, caplog):
    path, _ = filled
    content = path.read_bytes()
    solution = load(path)
    for when in FULL:
        with pytest.MonkeyPatch.context() as patch:
            FULL[when](patch)
            CacheEntry(path.parent, path.stem).store(solution)
    assert path.read_bytes() == content and len(warnings_of(caplog)) == len(FULL)


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_an_interrupt_while_storing_leaves_nothing(folder, when):
    model = adapted_llama()
    before = picture(model)

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_da.cache.store.os, when, interrupt)
        with pytest.raises(KeyboardInterrupt):
            start(model, folder)
    assert list(folder.iterdir()) == []
    assert differences(before, picture(model)) == []


def test_an_estimate_that_is_refused_is_not_kept(folder):
    model = adapted_llama()
    poison(model, f"{LAYERS}.0.self_attn.q_proj", 0.0)  # one of 14
    with pytest.raises(LoraDAError, match="have no solution"):
        start(model, folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "further"])
def test_a_cache_dir_that_is_a_file_is_refused_before_anything_runs(tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    model = adapted_llama()
    before, calls = picture(model), []
    rows = DataLoader(ROWS, 4, collate_fn=lambda rows: calls.append(1) or pad(rows))
    with pytest.raises(LoraDAError, match=r"^lora_da\.cache_dir is '.*file.*', which cannot be used as a folder: "):
        start(model, tmp_path / "file" / inside, rows)
    assert not calls and differences(before, picture(model)) == []
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_is_made_and_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    start(adapted_llama(), "~/some/where")
    assert len(list((tmp_path / "some" / "where").iterdir())) == 1
    assert start(adapted_llama(), "~/some/where")[0].from_cache


def test_a_link_to_a_folder_is_one(tmp_path, folder):
    (tmp_path / "real").mkdir()
    folder.symlink_to(tmp_path / "real", target_is_directory=True)
    start(adapted_llama(), folder)
    assert len(list((tmp_path / "real").iterdir())) == 1 and start(adapted_llama(), folder)[0].from_cache


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_written_through(tmp_path, filled, caplog):
    path, _ = filled
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path.unlink()
    path.symlink_to(victim)
    assert not start(adapted_llama(), path.parent)[0].from_cache
    assert victim.read_text() == "mine" and not path.is_symlink()
    assert start(adapted_llama(), path.parent)[0].from_cache


def test_a_folder_in_the_place_of_a_file(filled, caplog):
    path, expected = filled
    path.unlink()
    path.mkdir()
    model = adapted_llama()
    report, _ = start(model, path.parent)
    assert not report.from_cache and identical(adapter_weights(model), expected)
    assert len(warnings_of(caplog)) == 2  # neither read nor written
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_folder_that_is_closed(folder, mode, caplog):
    folder.mkdir()
    folder.chmod(mode)
    try:
        report, _ = start(adapted_llama(), folder)
    finally:
        folder.chmod(0o755)
    assert report.initialized == 14 and warnings_of(caplog)


@pytest.mark.parametrize("name", ["open", "safe_open"])
def test_a_file_that_may_not_be_read(folder, filled, monkeypatch, name, caplog):
    """What root is spared."""

    def closed(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(lora_da.cache.store, name, closed, raising=False)
    if name == "open":  # for writing
        filled[0].unlink()
    report, forwards = start(adapted_llama(), folder)
    assert forwards and report.initialized == 14
    assert os.strerror(errno.EACCES) in warnings_of(caplog)[0]


def test_files_are_those_of_any_other_program(folder):
    """Readable by whom the user lets: others share the folder."""
    before = os.umask(0o027)
    try:
        start(adapted_llama(), folder)
    finally:
        os.umask(before)
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o640


def test_many_at_once_see_all_or_nothing(filled, caplog):
    path, _ = filled
    solution = load(path)
    barrier, found = threading.Barrier(6), []

    def work(number):
        entry, layers = CacheEntry(path.parent, path.stem), find_adapter(adapted_llama()).layers
        barrier.wait()
        for _ in range(15):
            if number % 2:
                entry.store(solution)
            else:
                found.append(entry.load(layers) is not None)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 45 and warnings_of(caplog) == []
    assert list(path.parent.iterdir()) == [path]


RACER = """
    import sys, time
    sys.path[:0] = {path!r}
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from models import documents, pad, tiny_llama, with_lora
    from torch.utils.data import DataLoader
    from lora_da import LoraDAConfig, initialize_lora_da_weights
    model = with_lora(tiny_llama(), seed={number})
    data = DataLoader(documents(12), 4, collate_fn=pad)
    Path({place!r}, "ready-{number}").touch()
    while not Path({place!r}, "go").exists():
        time.sleep(0.001)
    initialize_lora_da_weights(model, data, LoraDAConfig(samples=8, cache_dir={folder!r}), show_progress=False)
    torch.save({{n: p.detach() for n, p in model.named_parameters() if "lora_" in n}}, Path({place!r}, "{number}.pt"))
"""


@pytest.mark.compat("cache")
@pytest.mark.slow
def test_two_processes_race(tmp_path, folder):
    tests = Path(__file__).parents[1]
    processes = []
    for number in range(2):
        names = {"path": [str(tests / "support"), str(tests.parent)], "number": number, "place": str(tmp_path)}
        code = textwrap.dedent(RACER.format(folder=str(folder), **names))
        processes.append(subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True))
    while not all((tmp_path / f"ready-{number}").exists() for number in range(2)):
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
    (tmp_path / "go").touch()
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert identical(first, second)
    (path,) = folder.iterdir()
    assert load(path) is not None
