"""From the sums of a segment to who makes something of them: layer by layer, each in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from torch import Tensor
from tqdm import tqdm

from lora_da.adapter import AdapterLayer
from lora_da.collect.feed import Work
from lora_da.collect.forecast import in_solving_order
from lora_da.collect.sums import SegmentSums
from lora_da.errors import LoraDAError
from lora_da.memory import is_out_of_memory
from lora_da.statistics import LayerStatistics, NotServed

T = TypeVar("T")


@dataclass(frozen=True)
class Observed:
    """What was collected of a layer; its tensors are the receiver's to use up, but for Z, which others read too.

    Args:
        statistics: its means.
        weight: W, (o, i), dequantised on its device; None where nobody reads it, or PEFT cannot dequantise it.
        reads_like: the layer whose input it shares, itself if none: their Z is one tensor.
        is_last_reader: whether no layer that shares this input is handed over after it.
    """

    statistics: LayerStatistics
    weight: Tensor | None
    reads_like: str
    is_last_reader: bool


@dataclass
class HandedOver(Generic[T]):
    """What came of some layers, by name.

    Args:
        outcomes: what was made of each, in the order in which they were handed over.
        tokens: that each was observed with.
        gradients: `gradient_size` of each that was observed, where there is one.
    """

    outcomes: dict[str, T | NotServed] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)

    def add(self, other: HandedOver[T]) -> None:
        """Take what came of others."""
        self.outcomes |= other.outcomes
        self.tokens |= other.tokens
        self.gradients |= other.gradients


# Takes a layer with what was collected of it.
SolveLayer: TypeAlias = Callable[[AdapterLayer, Observed], "T | NotServed"]


class HandingOver(Generic[T]):
    """Hands a segment's layers over, those whose sums this process has.

    Args:
        work: of which the segment is a part.
        sums: of its layers.
        scale: the factor that every d in them carries.
        bar: advanced by one for each layer.
        solve_layer: who they are handed to.
    """

    def __init__(self, work: Work, sums: SegmentSums, scale: float, bar: tqdm, solve_layer: SolveLayer[T]) -> None:
        self._work, self._sums, self._scale, self._bar = work, sums, scale, bar
        self._solve_layer = solve_layer
        # The gradient is averaged over samples or loss tokens.
        data = work.data
        self._n_units = data.n_loss_tokens if work.needs.averaging == "tokens" else data.n_samples

    def hand_over(self, layers: Sequence[AdapterLayer]) -> HandedOver[T]:
        """Hand those over that are this process's, the widest input last; each Z is freed after its last reader."""
        sums, processes, layers = self._sums, self._work.run.processes, in_solving_order(layers)
        done: HandedOver[T] = HandedOver()
        seen = [a.name for a in layers if a.name in sums.reads_like and a.name not in sums.misshapen]
        last_readers = set({sums.reads_like[name]: name for name in seen}.values())
        for layer in layers:
            name, passed_by = layer.name, self._was_passed_by(layer.name)
            if sums.owner.get(name, 0) != processes.rank:
                if processes.sharded and not passed_by:
                    self._weight(layer)  # where the base is sharded, all processes gather what its owner reads
                continue
            self._bar.update()
            if passed_by:
                done.outcomes[name] = NotServed("an expert that no token of the samples was routed to", failed=False)
                continue
            with self._work.watch("solve"):
                observed = self._observed(layer, name in last_readers)
                if isinstance(observed, Observed):
                    size = observed.statistics.gradient_size(self._n_units)  # before it is used up
                    if size is not None:
                        done.gradients[name] = size
                    done.outcomes[name] = self._solved(layer, observed)
                else:
                    done.outcomes[name] = observed
                del observed
                if name in last_readers:
                    sums.free_input(name)
            done.tokens[name] = sums.n_tokens(name)
        return done

    def _solved(self, layer: AdapterLayer, observed: Observed) -> T | NotServed:
        """What is made of a layer. That an expert was given too little to be solved by is no failure."""
        statistics = observed.statistics
        if layer.name not in self._work.survey.routed:
            return self._solve_layer(layer, observed)
        if not statistics.has_gradient():
            return NotServed("an expert whose tokens have no part in the loss", failed=False)
        fisher = statistics.output_fisher  # a full one of fewer tokens than outputs is singular but for its damping
        enough = max(layer.rank + 1, len(fisher) if fisher is not None and fisher.dim() == 2 else 0)
        outcome = self._solve_layer(layer, observed)
        if isinstance(outcome, NotServed) and statistics.n_tokens < enough:
            return NotServed(f"an expert of too few tokens to solve it: {outcome.why}", failed=False)
        return outcome

    def _was_passed_by(self, name: str) -> bool:
        """Whether a layer is inside an expert that was given no token that counts."""
        sums = self._sums
        return name in self._work.survey.routed and name not in sums.misshapen and sums.n_tokens(name) == 0

    def _observed(self, layer: AdapterLayer, is_last_reader: bool) -> Observed | NotServed:
        """What was collected of a layer, or why nothing was.

        Raises:
            LoraDAError: the layer was never seen, or no gradient reached it.
        """
        weight = self._weight(layer)
        if layer.name in self._sums.misshapen:
            return NotServed(
                f"its input has shape {self._sums.misshapen[layer.name]}, in which the tokens of the batch cannot be "
                "found (an expert or a vision layer? rows and tokens in an order that nothing tells?); take such "
                "layers out of target_modules (Axolotl: lora_target_modules)",
                failed=layer.slice is None,
            )
        statistics = self._sums.take_statistics(layer.name, self._n_units, self._scale)
        if statistics is None and layer.slice is not None:
            return NotServed(layer.slice.why_unseen, failed=False)
        if statistics is None:
            what = "a gradient" if self._work.needs.sums.backward else "a token"
            raise LoraDAError(
                f"layer {layer.name} was never reached by {what}: its forward is replaced (a fused kernel?) or it "
                "takes no part in the loss; switch the kernel off or take the layer out of target_modules"
            )
        return Observed(statistics, weight, self._sums.reads_like[layer.name], is_last_reader)

    def _weight(self, layer: AdapterLayer) -> Tensor | None:
        """W, for who reads it; all processes ask where it is sharded.

        Raises:
            LoraDAError: it does not fit in memory.
        """
        if not self._work.needs.weight:
            return None
        try:
            return layer.weight()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise LoraDAError(
                f"the weight of layer {layer.name} does not fit in memory beside what was collected; set a smaller "
                "`memory_budget`, so that fewer layers are served at a time"
            ) from error
