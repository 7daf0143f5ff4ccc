"""Blocks of an 8B's shape: peaks while borders are laid, blocks run and layers are solved, against the forecast."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.parts import Figures, NotRun, Part, Place, need
from benchmarks.gpu.peaks import estimate
from benchmarks.measure import measured
from benchmarks.subjects import Subject, llama, with_lora

ATTENTIONS = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
BLOCKS = 3  # a topmost one with the head, a lowest one without a border below, and one that has neither
TOKENS = 16_384
LENGTHS = (300, 2048)


def parts(place: Place) -> list[Part]:
    lengths = (32,) if place.toy else LENGTHS
    return [
        Part(f"{name}, rows of {length}", partial(_peaks, place, name, length))
        for length in lengths
        for name in ATTENTIONS
    ]


def _peaks(place: Place, attention: str, length: int) -> Figures:
    if attention == "flash":
        need("flash_attn")
        if not place.on_gpu:
            raise NotRun("no CUDA GPU")
    config = llama(64, 192, BLOCKS, 4, 2, 512) if place.toy else llama(4096, 14336, BLOCKS, 32, 8, 128256)
    tokens = 96 if place.toy else TOKENS
    subject = Subject("block", config, samples=max(2, tokens // length), length=length, batch_size=4)
    model = subject.build("nf4", place.device)
    model.set_attn_implementation(ATTENTIONS[attention])
    peft_model, loader = with_lora(model), subject.loader()
    # once before: what libraries allocate for good is in use before, as it is in a longer run
    estimate(peft_model, loader, 1, place.device)
    figures, cost = measured(lambda: estimate(peft_model, loader, subject.samples, place.device), place.device)
    return {"seconds": cost.seconds, **figures}
