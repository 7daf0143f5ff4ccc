"""A tiny model and files of letters; what needs TRL or bitsandbytes is imported when it is asked for."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from letters import TEST, TRAIN
    from models import tiny_llama
    from words import WORDS, as_lines, tokenizer

    folder = tmp_path_factory.mktemp("quality")
    tiny_llama(hidden_size=64, intermediate_size=128, vocab_size=len(WORDS)).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    as_lines(folder / "train.jsonl", TRAIN)
    as_lines(folder / "test.jsonl", TEST)
    return folder


@pytest.fixture
def data(folder, monkeypatch):
    monkeypatch.setenv("LORA_DA_DATA", str(folder))
    return folder


@pytest.fixture(scope="module")
def runner(folder):
    from benchmarks.quality.run import Runner

    return Runner(str(folder / "model"), "nf4", torch.device("cpu"))


@pytest.fixture(scope="module")
def twin_runner(folder):
    from benchmarks.quality.run import Runner

    return Runner(str(folder / "model"), "twin", torch.device("cpu"))


@pytest.fixture(scope="module")
def base(folder):
    from benchmarks.quality.base import load_base

    return load_base(str(folder / "model"), "nf4", torch.device("cpu"))
