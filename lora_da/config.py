"""The settings a user may touch. Standard library only: Axolotl reads this class at config load."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from lora_da.errors import LoraDAError


@dataclass(frozen=True)
class Preset:
    """What a named variant of LoRA-DA sets. The numbers can be overridden one by one in `LoraDAConfig`."""

    averaging: Literal["samples", "tokens"]
    variance_weight: float
    damping: float
    gamma: float
    full_fisher_up_to: int
    relative_damping: bool  # damping times the mean diagonal, or an absolute number
    normalize_step: bool  # divide D by its largest singular value
    match_input_energy: bool  # scale lora_A to plain LoRA's tr(A Z Aᵀ), or share 1/√gamma with lora_B


PRESETS: dict[str, Preset] = {
    # What a user gets. Real input covariances have condition numbers of 1e4 … 4e8 and output Fishers of 1e-9 … 2e-5:
    # damping relative to the mean diagonal is the choice that does not depend on those scales, and an A that carries
    # plain LoRA's input energy keeps a learning rate that was tuned for plain LoRA meaningful.
    "default": Preset(
        averaging="tokens",  # as transformers, TRL and Axolotl average the training loss
        variance_weight=1.0,
        damping=0.1,
        gamma=1024.0,
        full_fisher_up_to=0,
        relative_damping=True,
        normalize_step=True,
        match_input_energy=True,
    ),
    # The authors' released configuration.
    "reference": Preset(
        averaging="samples",
        variance_weight=0.03,
        damping=1e-6,
        gamma=1024.0,
        full_fisher_up_to=0,
        relative_damping=False,
        normalize_step=True,
        match_input_energy=False,
    ),
    # Algorithm 1 of arXiv 2510.24561; damping and the width limit of the full Fisher are not stated there and are ours.
    "paper": Preset(
        averaging="samples",
        variance_weight=1.0,
        damping=1e-6,
        gamma=1.0,
        full_fisher_up_to=4096,
        relative_damping=True,
        normalize_step=False,
        match_input_energy=False,
    ),
}


@dataclass(frozen=True)
class LoraDAConfig:
    """Settings of a LoRA-DA initialisation. `None` means: what the preset says.

    Args:
        preset: `default`; `reference`, the authors' released configuration; `paper`, Algorithm 1.
        samples: documents to estimate on, the first of the training data (the authors use 256).
        seed: draw the documents at random with this seed instead; needs a dataset with a length.
        population_size: N of the variance term, in documents: the size of the training set the adapter will see.
            The length of the training set unless given; needed where the dataset has no length.
        averaging: `samples`, every document weighs the same, or `tokens`, every loss token does.
        variance_weight: factor of the variance term in the guidance matrix Ω; 0 leaves the bias alone.
        damping: added to the diagonals of Z and Y: times their mean in `default` and `paper`, absolute in `reference`.
        gamma: divides the first step: lora_B @ lora_A has spectral norm at most 1/gamma where the step is normalised.
        full_fisher_up_to: widest layer output for which Y is estimated in full and not only its diagonal.
        memory_budget: GiB that may be used on the layers' device beside the model; what does not fit at once is
            streamed. 85 % of what is free on a GPU, half of it on a CPU, unless given.
        cache_dir: a folder for the solved factors: a later run on the same base, data and settings starts from them.

    Raises:
        LoraDAError: a value is out of its range; the message names the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    preset: Literal["default", "reference", "paper"] = "default"
    samples: int = 256
    seed: int | None = None
    population_size: int | None = None
    averaging: Literal["samples", "tokens"] | None = None
    variance_weight: float | None = None
    damping: float | None = None
    gamma: float | None = None
    full_fisher_up_to: int | None = None
    memory_budget: float | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, tuple(PRESETS))
        if self.averaging is not None:
            _one_of("averaging", self.averaging, ("samples", "tokens"))
        _number("samples", self.samples, 1, whole=True)
        _number("seed", self.seed, 0, whole=True)
        _number("population_size", self.population_size, 1, whole=True)
        _number("variance_weight", self.variance_weight, 0)
        _number("damping", self.damping, 0)
        _number("gamma", self.gamma, 0, exclusive=True)
        _number("full_fisher_up_to", self.full_fisher_up_to, 0, whole=True)
        _number("memory_budget", self.memory_budget, 0, exclusive=True)
        if self.cache_dir is not None and not (isinstance(self.cache_dir, str) and self.cache_dir.strip()):
            raise LoraDAError(f"lora_da.cache_dir is {self.cache_dir!r}; set the path of a folder, as text")

    def resolved_preset(self) -> Preset:
        """The preset with this config's own numbers in place of the preset's."""
        preset = PRESETS[self.preset]
        own = {f.name: getattr(self, f.name, None) for f in fields(preset)}
        return replace(preset, **{name: value for name, value in own.items() if value is not None})


def _one_of(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise LoraDAError(f"lora_da.{field} is {value!r}; set one of {', '.join(choices)}")


def _number(field: str, value: Any, low: float, *, whole: bool = False, exclusive: bool = False) -> None:
    if value is None and field != "samples":
        return
    kind, bound = ("a whole number" if whole else "a number"), ("above" if exclusive else "of at least")
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < low or (exclusive and value == low):
        raise LoraDAError(f"lora_da.{field} is {value!r}; set {kind} {bound} {low:g}")
