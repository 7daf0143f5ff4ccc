"""The sums of all layers that are watched together, and which of these layers share an input."""

from __future__ import annotations

from collections.abc import Iterable

from lora_da.needs import Needs
from lora_da.statistics import InputSums, LayerStatistics, LayerSums


class SegmentSums:
    """Sums of some layers, in this process.

    Args:
        layers: their names.
        needs: which sums are taken.

    Attributes:
        inputs: Σ x xᵀ by layer; of layers that share an input the first one's counts.
        by_layer: the other sums of the layers that were seen with a token.
        reads_like: the layer whose input a layer shares, itself if none, of every layer seen so far.
        misshapen: shapes of the inputs in which tokens cannot be found, by layer.
        owner: the process that has a layer's sums; missing where there is one process only.
    """

    def __init__(self, layers: Iterable[str], needs: Needs) -> None:
        self.needs = needs
        self.inputs = {name: InputSums(needs.sums) for name in layers}
        self.by_layer: dict[str, LayerSums] = {}
        self.reads_like: dict[str, str] = {}
        self.misshapen: dict[str, tuple[int, ...]] = {}
        self.owner: dict[str, int] = {}

    def of(self, name: str) -> LayerSums:
        """One layer's, begun where there are none yet."""
        if name not in self.by_layer:
            self.by_layer[name] = LayerSums(self.inputs[self.reads_like[name]], self.needs)
        return self.by_layer[name]

    def n_tokens(self, name: str) -> int:
        """Tokens that a layer was observed with."""
        return self.inputs[self.reads_like[name]].n_tokens if name in self.reads_like else 0

    def take_statistics(self, name: str, n_units: int, scale: float) -> LayerStatistics | None:
        """Means of one layer, once: its sums are used up. None where it was never observed.

        Args:
            name: of the layer.
            n_units: samples or loss tokens to average the gradient over.
            scale: the factor that every d carries.
        """
        sums = self.by_layer.pop(name, None)
        return None if sums is None else sums.take_means(n_units, scale)

    def free_input(self, name: str) -> None:
        """Forget the mean of a layer's input, which nobody reads any more."""
        self.inputs[self.reads_like[name]].free()
