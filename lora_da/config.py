"""The settings a user may touch. Standard library only: Axolotl reads this class at config load."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

from lora_da.errors import LoraDAError
from lora_da.methods import METHODS
from lora_da.methods.method import Method, Numbers, Preset
from lora_da.methods.presets import PRESETS
from lora_da.needs import Averaging, FirstStep

__all__ = ["METHODS", "PRESETS", "LoraDAConfig", "Preset"]

T = TypeVar("T", bound=Preset | Numbers)

# What is estimated on unless `samples` is given: documents, and the tokens in them at most. The loss before the first
# step falls from 2.83 to 2.72, 2.65, 2.59, 2.55 and 2.52 from 8, 16, 32, 64, 128 and 256 documents of NL2Bash, which
# takes the time of 5, 7, 7, 10, 12 and 22 training steps (benchmarks/results/sample_size): up to 64 a doubling pays for
# itself. 16,384 tokens are eight rows of 2,048, a training step at batch 8.
SAMPLES, TOKENS = 64, 16384

# What some method has no use for.
OF_SOME_METHODS = (
    "population_size",
    "averaging",
    "variance_weight",
    "damping",
    "gamma",
    "first_step",
    "chosen_rows",
    "match_rate",
    "full_fisher_up_to",
)

if TYPE_CHECKING:
    MethodChoice: TypeAlias = str | Method
    PresetChoice: TypeAlias = str | Preset
else:  # what pydantic sees: a config file names one, and only Python code can make one of its own
    MethodChoice = Literal[tuple(METHODS)]
    PresetChoice = Literal[tuple(PRESETS)]


@dataclass(frozen=True)
class LoraDAConfig:
    """Settings of an initialisation. `None` means: what the method, or LoRA-DA's preset, says.

    Args:
        method: `lora_da`, or another initialisation on the same statistics: `filet`, `cntlora`, `lora_one`, `lora_ga`;
            `lora_da.methods` has a file for each, which says how it differs from its paper; in Python also a `Method`
            of one's own. A number below that the method does not use must be left out.
        preset: of method `lora_da`: `default`, also if None; `reference`, the authors' released configuration; `paper`,
            Algorithm 1; in Python also a `Preset` of one's own.
        samples: documents to estimate on, the first of the training data (the authors use 256). `SAMPLES` unless given,
            or fewer, one at least, where these hold more than `TOKENS` tokens.
        seed: draw the documents at random with this seed instead; needs a dataset with a length.
        population_size: N of the variance term, in documents: the size of the training set the adapter will see.
            The length of the training set unless given; needed where the dataset has no length.
        averaging: `samples`, every document weighs the same, or `tokens`, every loss token does.
        variance_weight: factor of the variance term in the guidance matrix Ω; 0 leaves the bias alone.
        damping: added to the diagonals of Z and Y: times their mean in `default` and `paper`, absolute in `reference`;
            in `cntlora` to that of Z, times its mean.
        first_step: how far along lora_B @ lora_A training starts. `measured`: as far as lowers the loss the most on
            documents that the estimate has not seen, and not at all where nothing lowers it; `gamma`: as that says;
            `none`: lora_B = 0, so that the model starts as it is. By preset; `gamma` where a gamma is set.
        gamma: divides the first step: lora_B @ lora_A has spectral norm at most 1/gamma where the step is normalised,
            and 1/gamma in `lora_one`; in `lora_ga` lora_A carries 1/√gamma.
        chosen_rows: share of lora_A's rows, rounded up, that are solved for; the others are random, of plain LoRA's
            variance and the same whatever the seed, with no lora_B.
        match_rate: enlarge lora_A, and divide lora_B by as much, where the trainer's learning rate is far too small for
            the first step that was measured: up to training steps of a sixteenth to an eighth of it, 32 times at most.
            Where the rate is not known lora_A is as it is, and `true` is an error.
        full_fisher_up_to: widest layer output for which Y is estimated in full and not only its diagonal.
        memory_budget: GiB that may be used on the layers' device beside the model; what does not fit at once is
            streamed. 85 % of what is free on a GPU, half of it on a CPU, unless given.
        cache_dir: a folder for the solved factors: a later run on the same base, data and settings starts from them.

    Raises:
        LoraDAError: a value is out of its range; the message names the field.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    method: MethodChoice = "lora_da"
    preset: PresetChoice | None = None
    samples: int | None = None
    seed: int | None = None
    population_size: int | None = None
    averaging: Averaging | None = None
    variance_weight: float | None = None
    damping: float | None = None
    gamma: float | None = None
    first_step: FirstStep | None = None
    chosen_rows: float | None = None
    match_rate: bool | None = None
    full_fisher_up_to: int | None = None
    memory_budget: float | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            _one_of("method", self.method, tuple(METHODS))
        if isinstance(self.preset, Preset):
            _check_numbers(self.preset)
        elif self.preset is not None:
            named = self.chosen_method().presets
            _one_of("preset", self.preset, tuple(named if len(named) > 1 else PRESETS))
        _number("samples", self.samples, 1, whole=True)
        _number("seed", self.seed, 0, whole=True)
        _number("population_size", self.population_size, 1, whole=True)
        _check_numbers(self)
        _number("memory_budget", self.memory_budget, 0, exclusive=True)
        if self.cache_dir is not None and not (isinstance(self.cache_dir, str) and self.cache_dir.strip()):
            raise LoraDAError(f"lora_da.cache_dir is {self.cache_dir!r}; set the path of a folder, as text")
        if self.cache_dir is not None and self.chosen_method() not in METHODS.values():
            raise LoraDAError(
                f"lora_da.cache_dir is {self.cache_dir!r}, and method {self.chosen_method().name} is one of your own, "
                "which may have changed under its name since a solution was kept; leave cache_dir out"
            )
        self._check_uses()

    def _check_uses(self) -> None:
        """Refuse what the method has no use for."""
        method = self.chosen_method()
        if self.preset is not None and len(method.presets) == 1:
            raise LoraDAError(
                f"lora_da.preset is {self.preset!r}, and presets are variants of method lora_da; leave it out with "
                f"method {method.name}"
            )
        for name in OF_SOME_METHODS:
            used = method.population if name == "population_size" else name in method.settable
            if getattr(self, name) is not None and not used:
                raise LoraDAError(
                    f"lora_da.{name} is {getattr(self, name)!r}, which method {method.name} has no use for; leave it "
                    f"out (of the numbers, this method takes {' and '.join(method.settable)})"
                )
        if self.gamma is not None and self.first_step in ("measured", "none"):
            raise LoraDAError(
                f"lora_da.gamma is {self.gamma!r} and lora_da.first_step {self.first_step!r}, which has no use for it; "
                "leave one of them out"
            )
        if self.match_rate and self.numbers().first_step != "measured":
            raise LoraDAError(
                "lora_da.match_rate is True, which holds training steps against a first step that is measured; leave "
                "it out, or set `first_step: measured`, and no gamma"
            )

    def size(self) -> tuple[int, int | None]:
        """How many documents to estimate on, and the tokens that they may hold, None for any number."""
        return (SAMPLES, TOKENS) if self.samples is None else (self.samples, None)

    def chosen_method(self) -> Method:
        """The method itself."""
        return self.method if isinstance(self.method, Method) else METHODS[self.method]

    def numbers(self) -> Preset | Numbers:
        """What the method, or its preset, is set by, with this config's own numbers in the place of its."""
        if isinstance(self.preset, Preset):
            return self._with_own(self.preset)
        return self._with_own(self.chosen_method().presets[self.preset or "default"])

    def settings(self) -> dict[str, Any]:
        """All there is to say of a run: these settings with the numbers in use, None where the method has none."""
        chosen = self.chosen_method()
        preset = self.preset or ("default" if len(chosen.presets) > 1 else None)
        plain = {"method": chosen.name, "preset": asdict(preset) if isinstance(preset, Preset) else preset}
        return {**vars(self), **plain, **asdict(self.numbers())}

    def _with_own(self, numbers: T) -> T:
        own = {f.name: getattr(self, f.name, None) for f in fields(numbers)}
        if self.gamma is not None and numbers.first_step is not None:
            own["first_step"] = "gamma"
        chosen = replace(numbers, **{name: value for name, value in own.items() if value is not None})
        return replace(chosen, match_rate=False) if chosen.match_rate and chosen.first_step != "measured" else chosen


def _check_numbers(given: LoraDAConfig | Preset) -> None:
    if given.averaging is not None:
        _one_of("averaging", given.averaging, ("samples", "tokens"))
    _number("variance_weight", given.variance_weight, 0)
    _number("damping", given.damping, 0)
    _number("gamma", given.gamma, 0, exclusive=True)
    if given.first_step is not None:
        _one_of("first_step", given.first_step, get_args(FirstStep))
    _number("chosen_rows", given.chosen_rows, 0, exclusive=True)
    if given.chosen_rows is not None and given.chosen_rows > 1:
        raise LoraDAError(f"lora_da.chosen_rows is {given.chosen_rows!r}; set a share of lora_A's rows, 1 for all")
    if given.match_rate is not None and not isinstance(given.match_rate, bool):
        raise LoraDAError(f"lora_da.match_rate is {given.match_rate!r}; set true or false")
    _number("full_fisher_up_to", given.full_fisher_up_to, 0, whole=True)


def _one_of(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise LoraDAError(f"lora_da.{field} is {value!r}; set one of {', '.join(choices)}")


def _number(field: str, value: Any, low: float, *, whole: bool = False, exclusive: bool = False) -> None:
    check_number(f"lora_da.{field}", value, low, whole=whole, exclusive=exclusive)


def check_number(name: str, value: Any, low: float, *, whole: bool = False, exclusive: bool = False) -> None:
    """Refuse what is no finite number from a bound on; None is left out and passes.

    Raises:
        LoraDAError: the message has the name, the value and what to set.
    """
    if value is None:
        return
    kind, bound = ("a whole number" if whole else "a number"), ("above" if exclusive else "of at least")
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < low or (exclusive and value == low):
        raise LoraDAError(f"{name} is {value!r}; set {kind} {bound} {low:g}")
