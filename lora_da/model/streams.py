"""What the layers of a model read, where that is not one run of tokens for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lora_da.samples.batch import TOKENS


@dataclass(frozen=True)
class Streams:
    """Where layers are that read a stream.

    Shapes do not tell: the rows of an encoder and of a decoder may be of like length.

    Args:
        within: the module whose layers read it, by stream, and all others read something unknown; every layer reads
            `TOKENS` if empty. Wherever a layer is, it reads `ENCODER` if it is handed the very tensor that the
            module of that name returns.
    """

    within: Mapping[str, nn.Module] = field(default_factory=dict)

    def of(self, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        """The stream of each layer, by name; missing where unknown."""
        if not self.within:
            return dict.fromkeys(layers, TOKENS)
        stream_of = {id(module): stream for stream, outer in self.within.items() for module in outer.modules()}
        return {name: stream_of[id(layer)] for name, layer in layers.items() if id(layer) in stream_of}
