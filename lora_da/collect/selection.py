"""Which rows of a layer's input count: those of tokens, of an encoder's, of whole rows, of an expert, of the head."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_da.collect.order import Chosen, Orders, Positions
from lora_da.model.experts import KnownRows, Routed
from lora_da.model.streams import Streams
from lora_da.samples.batch import ENCODER, ROWS, TOKENS


class Selection:
    """Says which rows count, batch by batch.

    Args:
        layers: the base layers, by name.
        streams: where the layers are that read other than the tokens of the loss.
        routed: the layers that are inside an expert and read some of the tokens only.
    """

    def __init__(self, layers: Mapping[str, nn.Module], streams: Streams, routed: Mapping[str, Routed]) -> None:
        self._stream_of = streams.of(layers)
        self._within = streams.within
        self._routed = {name: routed[name] for name in layers if name in routed}
        self._orders = Orders()
        self._batch: _BatchRows | None = None

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Hook the modules that hand hidden states to experts and to layers that read an encoder's."""
        experts = {*self._routed.values()}
        mixtures = {routed.mixture for routed in experts}
        hooks = [m.register_forward_pre_hook(self._note_mixture, with_kwargs=True) for m in mixtures]
        hooks += [
            routed.expert.register_forward_pre_hook(functools.partial(self._note_call, routed), with_kwargs=True)
            for routed in experts
            if isinstance(routed.expert, nn.Module)
        ]
        if ENCODER in self._within:
            hooks.append(self._within[ENCODER].register_forward_hook(self._note_encoded))
            hooks.append(self._within[TOKENS].register_forward_pre_hook(self._note_handed_over, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._batch = None

    @property
    def is_reading(self) -> bool:
        """Whether a batch was announced."""
        return self._batch is not None

    def reading(self, counted: Tensor, device: torch.device, others: Mapping[str, Tensor]) -> None:
        """Say which tokens the next forward reads.

        Args:
            counted: (rows, columns) bool, the positions that count; d is zero at the others.
            device: where the samples go.
            others: the same of streams other than `TOKENS`, each with a number of positions of its own.
        """
        self._batch = _BatchRows(counted, device, others)

    @contextlib.contextmanager
    def in_head(self, n: int, weights: Tensor | None) -> Iterator[None]:
        """Layers that run inside are the head's: they read `n` tokens that carry loss, and rows behind them that do
        not count.

        Args:
            n: tokens.
            weights: (n,) what each one's loss is still to be multiplied by, its d with it; 1 if None.
        """
        assert self._batch is not None, "no batch was announced"
        self._batch.head = n, weights
        try:
            yield
        finally:
            self._batch.head = None

    def chosen(self, name: str, x: Tensor) -> Chosen | None:
        """Which rows of a layer's input x (…, i) count, as far as x tells; None where that cannot be told."""
        batch = self._batch
        assert batch is not None, "no batch was announced"
        if batch.head is not None:
            n, weights = batch.head
            return Chosen(torch.arange(n, device=x.device), weights)
        routed = self._routed.get(name)
        if routed is not None and routed.mixture in batch.mixture_inputs:
            rows = x.detach().flatten(0, -2)
            # of an expert whose layers are called without it, the lowest ones tell
            positions = None if routed in batch.called else batch.positions_in(routed.mixture, rows)
            if positions is not None:
                batch.expert_positions[routed] = positions
            # a layer further inside reads what the expert has made of the same rows
            positions = batch.expert_positions.get(routed)
            if positions is not None and len(positions) == len(rows):
                return batch.among(positions)
        stream = self._stream(name, x, batch)
        of_stream = None if stream is None else batch.positions.get(stream)
        return None if of_stream is None else self._orders.chosen(name, of_stream, tuple(x.shape[:-1]))

    def settled(self, name: str, chosen: Chosen | None, d: Tensor | None) -> Chosen | None:
        """Which do, once d, (…, o), is known too or there is none; None where that cannot be told."""
        return None if chosen is None else self._orders.settled(name, chosen, d)

    def _stream(self, name: str, x: Tensor, batch: _BatchRows) -> str | None:
        """What x (…, i) of a layer is made of; None if unknown."""
        if any(same_memory(x, hidden) for hidden in batch.handed_over):
            return ENCODER
        if ROWS in batch.positions and x.dim() == 2 and name not in self._routed:
            # Some layers read all tokens in one list; where a row is one token, that is the same.
            return TOKENS if len(x) == len(batch.positions[TOKENS]) else ROWS
        return self._stream_of.get(name)

    def _note_encoded(self, _encoder: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._batch is not None:
            self._batch.handed_over.append(output[0].detach())

    def _note_handed_over(self, _reader: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("encoder_hidden_states")  # what the encoder returned may have been projected on its way
        if self._batch is not None and isinstance(hidden, Tensor):
            self._batch.handed_over.append(hidden.detach())

    def _note_mixture(self, mixture: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if self._batch is None or hidden is None:
            return
        tokens = self._batch.positions[TOKENS]
        if hidden.shape[:-1] in (tokens.shape, (len(tokens),), (1, len(tokens))):
            self._batch.mixture_inputs[mixture] = KnownRows(hidden.detach().flatten(0, -2))

    def _note_call(self, routed: Routed, _expert: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if hidden is not None:
            self.note_expert(routed, hidden)

    def note_expert(self, routed: Routed, x: Tensor) -> None:
        """Note that an expert reads x (…, h); where these are rows of its mixture's, they are its tokens."""
        if self._batch is None or routed.mixture not in self._batch.mixture_inputs:
            return
        positions = self._batch.positions_in(routed.mixture, x.detach().flatten(0, -2))
        if positions is not None:
            self._batch.expert_positions[routed] = positions
            self._batch.called.add(routed)


class _BatchRows:
    """What is known of one batch while it runs.

    Attributes:
        positions: of each stream.
        handed_over: an encoder's hidden states, as it returned them and as their reader got them.
        mixture_inputs: what each mixture of experts was called with.
        expert_positions: of the tokens that each expert was given last.
        called: the experts of which that is known from their own call.
        head: as `Selection.in_head` is told, while it runs.
    """

    def __init__(self, counted: Tensor, device: torch.device, others: Mapping[str, Tensor]) -> None:
        self._counts = None if counted.all() else counted.flatten().to(device, non_blocking=True)
        self.positions = {
            stream: Positions.counted(counts, device) for stream, counts in {**others, TOKENS: counted}.items()
        }
        self.handed_over: list[Tensor] = []
        self.mixture_inputs: dict[nn.Module, KnownRows] = {}
        self.expert_positions: dict[Routed, Tensor] = {}
        self.called: set[Routed] = set()
        self.head: tuple[int, Tensor | None] | None = None

    def positions_in(self, mixture: nn.Module, rows: Tensor) -> Tensor | None:
        """Where each of `rows` (n, h) stands among those that a mixture was called with; None where one does not."""
        return self.mixture_inputs[mixture].positions_of(rows)

    def among(self, positions: Tensor) -> Chosen:
        """Choose those that count among some tokens, given by their positions."""
        counts = self._counts
        return Chosen(None if counts is None else counts.to(positions.device)[positions].nonzero().flatten())


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same numbers in the same layout."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
