"""The settings a user may touch. Standard library only: Axolotl reads this class at config load."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

from lora_da.errors import LoraDAError

Averaging: TypeAlias = Literal["samples", "tokens"]
T = TypeVar("T", "Preset", "Numbers")
MethodName: TypeAlias = Literal["lora_da", "filet", "cntlora", "lora_one", "lora_ga"]


@dataclass(frozen=True)
class Preset:
    """What a named variant of LoRA-DA sets. The numbers can be overridden one by one in `LoraDAConfig`."""

    averaging: Averaging
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
        damping=0.1,  # 0.01 and 1 end alike (benchmarks/results/quality)
        # At step 0 the model is nearly the base, which the reference of DPO and GRPO is. 16, a first step of useful
        # size, is ahead early and not to be told from this at the end (benchmarks/results/quality).
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
class Numbers:
    """What a method other than LoRA-DA is set by; None where it has no such number."""

    averaging: Averaging | None = None
    damping: float | None = None
    gamma: float | None = None


OTHER_METHODS: dict[str, Numbers] = {
    "filet": Numbers(averaging="tokens"),
    "cntlora": Numbers(damping=0.1),  # as in LoRA-DA's default: the same Z is damped
    "lora_one": Numbers(averaging="tokens", gamma=128.0),  # the paper's
    "lora_ga": Numbers(averaging="tokens", gamma=16.0),  # PEFT's default
}
METHODS = ("lora_da", *OTHER_METHODS)
# What some method has no use for.
OF_SOME_METHODS = ("population_size", "averaging", "variance_weight", "damping", "gamma", "full_fisher_up_to")

if TYPE_CHECKING:
    PresetChoice: TypeAlias = Literal["default", "reference", "paper"] | Preset
else:  # what pydantic sees: a config file names one, and only Python code can make one of its own
    PresetChoice = Literal["default", "reference", "paper"]


@dataclass(frozen=True)
class LoraDAConfig:
    """Settings of an initialisation. `None` means: what the method, or LoRA-DA's preset, says.

    Args:
        method: `lora_da`, or another initialisation on the same statistics: `filet`, `cntlora`, `lora_one`, `lora_ga`;
            `lora_da.methods` has a file for each, which says how it differs from its paper. A number below that the
            method does not use must be left out.
        preset: of method `lora_da`: `default`, also if None; `reference`, the authors' released configuration; `paper`,
            Algorithm 1; in Python also a `Preset` of one's own.
        samples: documents to estimate on, the first of the training data (the authors use 256).
        seed: draw the documents at random with this seed instead; needs a dataset with a length.
        population_size: N of the variance term, in documents: the size of the training set the adapter will see.
            The length of the training set unless given; needed where the dataset has no length.
        averaging: `samples`, every document weighs the same, or `tokens`, every loss token does.
        variance_weight: factor of the variance term in the guidance matrix Ω; 0 leaves the bias alone.
        damping: added to the diagonals of Z and Y: times their mean in `default` and `paper`, absolute in `reference`;
            in `cntlora` to that of Z, times its mean.
        gamma: divides the first step: lora_B @ lora_A has spectral norm at most 1/gamma where the step is normalised,
            and 1/gamma in `lora_one`; in `lora_ga` lora_A carries 1/√gamma.
        full_fisher_up_to: widest layer output for which Y is estimated in full and not only its diagonal.
        memory_budget: GiB that may be used on the layers' device beside the model; what does not fit at once is
            streamed. 85 % of what is free on a GPU, half of it on a CPU, unless given.
        cache_dir: a folder for the solved factors: a later run on the same base, data and settings starts from them.

    Raises:
        LoraDAError: a value is out of its range; the message names the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    method: MethodName = "lora_da"
    preset: PresetChoice | None = None
    samples: int = 256
    seed: int | None = None
    population_size: int | None = None
    averaging: Averaging | None = None
    variance_weight: float | None = None
    damping: float | None = None
    gamma: float | None = None
    full_fisher_up_to: int | None = None
    memory_budget: float | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        if isinstance(self.preset, Preset):
            _check_numbers(self.preset)
        elif self.preset is not None:
            _one_of("preset", self.preset, tuple(PRESETS))
        _number("samples", self.samples, 1, whole=True)
        _number("seed", self.seed, 0, whole=True)
        _number("population_size", self.population_size, 1, whole=True)
        _check_numbers(self)
        _number("memory_budget", self.memory_budget, 0, exclusive=True)
        if self.cache_dir is not None and not (isinstance(self.cache_dir, str) and self.cache_dir.strip()):
            raise LoraDAError(f"lora_da.cache_dir is {self.cache_dir!r}; set the path of a folder, as text")
        if self.method != "lora_da":
            self._check_other_method()

    def _check_other_method(self) -> None:
        if self.preset is not None:
            raise LoraDAError(
                f"lora_da.preset is {self.preset!r}, and presets are variants of method lora_da; leave it out with "
                f"method {self.method}"
            )
        used = [name for name, value in vars(OTHER_METHODS[self.method]).items() if value is not None]
        for name in OF_SOME_METHODS:
            if getattr(self, name) is not None and name not in used:
                raise LoraDAError(
                    f"lora_da.{name} is {getattr(self, name)!r}, which method {self.method} has no use for; leave it "
                    f"out (of the numbers, this method takes {' and '.join(used)})"
                )

    def numbers(self) -> Preset | Numbers:
        """What the method, or LoRA-DA's preset, is set by, with this config's own numbers in the place of its."""
        return self._with_own(OTHER_METHODS[self.method]) if self.method != "lora_da" else self.resolved_preset()

    def settings(self) -> dict[str, Any]:
        """All there is to say of a run: these settings with the numbers in use, None where the method has none."""
        preset = self.preset or ("default" if self.method == "lora_da" else None)
        return {**asdict(replace(self, preset=preset)), **asdict(self.numbers())}

    def resolved_preset(self) -> Preset:
        """The preset with this config's own numbers in place of the preset's."""
        preset = self.preset or "default"
        return self._with_own(preset if isinstance(preset, Preset) else PRESETS[preset])

    def _with_own(self, numbers: T) -> T:
        own = {f.name: getattr(self, f.name, None) for f in fields(numbers)}
        return replace(numbers, **{name: value for name, value in own.items() if value is not None})


def _check_numbers(given: LoraDAConfig | Preset) -> None:
    if given.averaging is not None:
        _one_of("averaging", given.averaging, ("samples", "tokens"))
    _number("variance_weight", given.variance_weight, 0)
    _number("damping", given.damping, 0)
    _number("gamma", given.gamma, 0, exclusive=True)
    _number("full_fisher_up_to", given.full_fisher_up_to, 0, whole=True)


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
