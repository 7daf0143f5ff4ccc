"""Statistics of the targeted layers, from hooks on an ordinary forward and backward pass, or on a forward alone.

A layer's input x is kept by an autograd function wrapped around its output, and met by the output's gradient d in the
backward pass. What checkpointing computes twice is therefore counted once, re-entrant or not: only the graph that is
really backpropagated through ever reaches `backward`. Where no sum needs d, x is summed in the forward hook.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lora_da.errors import LoraDAError
from lora_da.model.experts import KnownRows, Routed
from lora_da.model.gradients import blocked
from lora_da.model.streams import Streams
from lora_da.processes import Ranks
from lora_da.samples.batch import ENCODER, ROWS, TOKENS
from lora_da.statistics import ALL_SUMS, InputSums, LayerStatistics, LayerSums, Sums, summable

UNKNOWN = "unknown"  # instead of the rows of an input that count


class Collector:
    """Sums (x, d) of some layers while `observing`; a fitter in the sense of `statistics`, which it fills.

    Args:
        layers: the base layers, by name.
        full_fisher: names of the layers whose output Fisher is kept in full.
        scale: the factor that every d carries.
        timed: a context to compute the products in.
        routed: the layers that are inside an expert and read some of the tokens only.
        head: the language-model head, which reads what `reading_head` says.
        streams: where the layers are that read other than the tokens of the loss.
        sums: which are taken. Of those that need no d a forward pass is enough, and none of it is counted twice.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        full_fisher: frozenset[str] = frozenset(),
        scale: float = 1.0,
        timed: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        routed: Mapping[str, Routed] | None = None,
        head: str | None = None,
        streams: Streams | None = None,
        sums: Sums = ALL_SUMS,
    ) -> None:
        self.layers = layers
        self._taken = sums
        self.full_fisher = full_fisher
        self.misshapen: dict[str, tuple[int, ...]] = {}  # layers whose input is not (rows, columns, i)
        self.overflowed: Tensor | None = None  # whether a float16 gradient was not finite
        self.scale = scale
        self._timed = timed
        self._routed = routed or {}
        self._head, self._head_rows = head, 0
        self._head_weights: Tensor | None = None
        self._streams = streams or Streams()
        self._stream_of = self._streams.of(layers)
        # the encoder's hidden states, as it returned them and as its reader got them
        self._handed_over: list[Tensor] = []
        self._mixture_inputs: dict[nn.Module, KnownRows] = {}
        self._expert_positions: dict[nn.Module, Tensor] = {}  # of the tokens that each expert was given last
        self._reads_like: dict[str, str] = {}  # layer → the layer whose input it shares, itself if none
        self._computes_in: dict[str, torch.dtype] = {}  # layer → the dtype it casts its input to
        self._n_positions: int | None = None
        self._others: dict[str, tuple[int, Tensor]] = {}  # of other streams: positions, and which of them count
        self._last_input: tuple[Tensor, int, str] | None = None
        self._last_selected: tuple[Tensor, int, Tensor] | None = None
        self._inputs = {name: InputSums(sums) for name in self.layers}
        self._sums: dict[str, LayerSums] = {}
        self._owner: dict[str, int] = {}  # the process that has a layer's sums; missing where there is one only

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Hook the layers."""
        hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        mixtures = {routed.mixture for routed in self._routed.values()}
        hooks += [m.register_forward_pre_hook(self._note_mixture, with_kwargs=True) for m in mixtures]
        if ENCODER in self._streams.within:
            hooks.append(self._streams.within[ENCODER].register_forward_hook(self._note_encoded))
            reader = self._streams.within[TOKENS]
            hooks.append(reader.register_forward_pre_hook(self._note_handed_over, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._forget_batch()

    def reading(self, counted: Tensor, device: torch.device, others: Mapping[str, Tensor] | None = None) -> None:
        """Say which tokens the next forward reads.

        Args:
            counted: (p,) bool, the positions that count; d is zero at the others.
            device: where the samples go.
            others: the same of streams other than `TOKENS`, each with a number of positions of its own.
        """
        self._forget_batch()
        self._n_positions, self._device = len(counted), device
        self._counts = None if bool(counted.all()) else counted.to(device, non_blocking=True)
        self._counted = None if self._counts is None else counted.nonzero().flatten().to(device, non_blocking=True)
        self._others = {
            stream: (counts.numel(), counts.flatten().nonzero().flatten().to(device, non_blocking=True))
            for stream, counts in (others or {}).items()
        }

    def reduce(self, ranks: Ranks) -> None:
        """Sum over the processes. Each layer's sums are with one of them then, its owner; counts are with all."""
        if ranks.size == 1:
            return
        seen = {
            name: (self._reads_like[name], *sums.shape) for name, sums in self._sums.items() if sums.shape is not None
        }
        counts = {name: inputs.n_tokens for name, inputs in self._inputs.items()}
        shapes: dict[str, tuple[str, int, int, torch.dtype]] = {}
        tokens = dict.fromkeys(self.layers, 0)
        own = (seen, counts, self.misshapen)
        for others_seen, others_counts, misshapen in [own] if ranks.sharded else ranks.gathered(own):
            shapes |= others_seen
            self.misshapen |= misshapen
            for name, n in others_counts.items():
                tokens[name] += n
        costs: dict[str, float] = {}
        for source, o, i, _ in shapes.values():
            costs[source] = costs.get(source, i**3) + o * i**2
        owners = ranks.owners(costs)
        # in the same order everywhere
        for name in (name for name in self.layers if name in shapes):
            source, o, i, dtype = shapes[name]
            like = torch.empty(0, dtype=dtype, device=self._device)
            inputs = self._inputs[source]
            if name == source:
                inputs.reduce(ranks, owners[source], i, like)
                inputs.n_tokens = tokens[source]
            self._reads_like[name], self._owner[name] = source, owners[source]
            sums = self._sums.pop(name, None) or self._new_sums(name)
            sums.reduce(ranks, owners[source], o, i, like)
            if owners[source] == ranks.rank:
                self._sums[name] = sums

    def owner(self, name: str) -> int:
        """The process that has a layer's statistics."""
        return self._owner.get(name, 0)

    def reading_head(self, n: int, weights: Tensor | None) -> None:
        """Say what the head's next call reads: `n` tokens that carry loss, and rows behind them that do not count.

        Args:
            n: tokens.
            weights: (n,) what each one's loss is still to be multiplied by, its d with it; 1 if None.
        """
        self._head_rows, self._head_weights = n, weights

    def statistics(self, name: str, n_units: int) -> LayerStatistics | None:
        """Means of one layer, its gradient averaged over `n_units`, once: its sums are used up. None where it was never
        observed."""
        sums = self._sums.pop(name, None)
        return None if sums is None else sums.means(n_units, self.scale)

    def shared_inputs(self) -> dict[str, str]:
        """Of every layer seen so far, the layer whose input it shares, itself if none."""
        return dict(self._reads_like)

    def reads_like(self, name: str) -> str:
        """The layer whose input covariance this layer shares; itself if none."""
        return self._reads_like[name]

    def n_tokens(self, name: str) -> int:
        """Tokens a layer was observed with."""
        return self._inputs[self._reads_like[name]].n_tokens if name in self._reads_like else 0

    def was_passed_by(self, name: str) -> bool:
        """Whether a layer is inside an expert that was given no token that counts."""
        return name in self._routed and name not in self.misshapen and self.n_tokens(name) == 0

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def observe(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            backward = self._taken.backward
            if backward and not torch.is_grad_enabled():
                return output  # the first forward of a re-entrant checkpoint
            x = args[0]
            if backward and x.requires_grad and not output.requires_grad:
                raise blocked(name, module)
            self._note_sharing(name, x)
            if self._n_positions is None:
                return output  # only looked at, in a survey
            self._computes_in[name] = _compute_dtype(module, x)
            chosen = self._chosen(name, x)
            if not backward:
                self._add_input(name, chosen, x, output.shape[-1])
                return output
            anchor = torch.empty(0, device=output.device, requires_grad=True)
            weights = self._head_weights if name == self._head else None
            wrapped: Tensor = _Observe.apply(output, anchor, x.detach(), self._add, (name, chosen, weights))
            return wrapped

        return observe

    def _note_sharing(self, name: str, x: Tensor) -> None:
        """Layers that are handed the very same tensor share one Z; decided when a layer is first seen."""
        last = self._last_input  # one that was changed in place since is another
        shares_with = last[2] if last is not None and last[0] is x and last[1] == x._version else name
        if self._reads_like.setdefault(name, shares_with) != shares_with:
            raise LoraDAError(
                f"layer {name} read the same input as {self._reads_like[name]} at first and another one later; "
                "exclude it from target_modules"
            )
        self._last_input = (x, x._version, shares_with)

    def look_for_overflow(self, gradient: Tensor) -> None:
        """Note in `overflowed` if a float16 gradient is not finite, without waiting for the device."""
        if gradient.dtype == torch.float16:
            overflow = ~torch.isfinite(gradient).all()
            self.overflowed = overflow if self.overflowed is None else self.overflowed.to(gradient.device) | overflow

    def _chosen(self, name: str, x: Tensor) -> Tensor | str | None:
        """Which rows of x (…, i) count: indices, or None for all of them, or `UNKNOWN`."""
        if name == self._head:
            return torch.arange(self._head_rows, device=x.device)
        routed = self._routed.get(name)
        if routed is not None and routed.mixture in self._mixture_inputs:
            rows = x.detach().flatten(0, -2)
            positions = self._mixture_inputs[routed.mixture].positions_of(rows)
            if positions is not None:
                self._expert_positions[routed.expert] = positions
            # a layer further inside reads what the expert has made of the same rows
            positions = self._expert_positions.get(routed.expert)
            if positions is not None and len(positions) == len(rows):
                counts = self._counts
                return None if counts is None else counts.to(positions.device)[positions].nonzero().flatten()
        stream = self._stream(name, x)
        known = (self._n_positions, self._counted) if stream == TOKENS else self._others.get(stream)
        return known[1] if known is not None and x.shape[:-1].numel() == known[0] else UNKNOWN

    def _stream(self, name: str, x: Tensor) -> str:
        """What x (…, i) of a layer is made of."""
        if any(_same_memory(x, hidden) for hidden in self._handed_over):
            return ENCODER
        if ROWS in self._others and x.dim() == 2 and name not in self._routed:
            # Some layers read all tokens in one list; where a row is one token, that is the same.
            return TOKENS if len(x) == self._n_positions else ROWS
        return self._stream_of.get(name, UNKNOWN)

    def _note_encoded(self, _encoder: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._handed_over.append(output[0].detach())

    def _note_handed_over(self, _reader: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("encoder_hidden_states")  # what the encoder returned may have been projected on its way
        if isinstance(hidden, Tensor):
            self._handed_over.append(hidden.detach())

    def _note_mixture(self, mixture: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if hidden is not None and hidden.shape[:-1].numel() == self._n_positions:
            self._mixture_inputs[mixture] = KnownRows(hidden.detach().flatten(0, -2))

    def _forget_batch(self) -> None:
        self._last_input = self._last_selected = None
        self._mixture_inputs, self._expert_positions, self._handed_over = {}, {}, []

    def _add(self, call: tuple[str, Tensor | str | None, Tensor | None], x: Tensor, d: Tensor) -> None:
        """One call's tokens: x (…, i), d (…, o)."""
        name, chosen, weights = call
        if isinstance(chosen, str):
            self.misshapen[name] = tuple(x.shape)
            return
        self.look_for_overflow(d)
        if name not in self._sums:
            self._sums[name] = self._new_sums(name)
        with self._timed(), torch.autocast(x.device.type, enabled=False):
            x, d = self._selected(x.detach(), d.detach(), chosen, self._computes_in[name])
            if weights is not None:
                d = d * weights.to(d).unsqueeze(1)
            if self._reads_like[name] == name:
                self._inputs[name].add(x)
            self._sums[name].add(x, d)

    @torch.no_grad()
    def _add_input(self, name: str, chosen: Tensor | str | None, x: Tensor, o: int) -> None:
        """One call's tokens x (…, i), of which the layer makes (…, o), where no d is to come."""
        if isinstance(chosen, str):
            self.misshapen[name] = tuple(x.shape)
            return
        if name not in self._sums:
            self._sums[name] = self._new_sums(name)
        with self._timed(), torch.autocast(x.device.type, enabled=False):
            rows = self._summable_input(x.detach(), chosen, self._computes_in[name])
            if self._reads_like[name] == name:
                self._inputs[name].add(rows)
            self._sums[name].note(rows, o)

    def _new_sums(self, name: str) -> LayerSums:
        return LayerSums(self._inputs[self._reads_like[name]], name in self.full_fisher, self._taken)

    def _selected(self, x: Tensor, d: Tensor, counted: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The counted tokens, (n, i) and (n, o), ready to be summed; x only once for layers that share it."""
        d = summable(_rows(d, counted), dtype)
        x = self._summable_input(x, counted, dtype)
        common = torch.promote_types(x.dtype, d.dtype)
        return x.to(common), d.to(common)

    def _summable_input(self, x: Tensor, counted: Tensor | None, dtype: torch.dtype) -> Tensor:
        last = self._last_selected
        if last is None or last[1] != x._version or not _same_memory(last[0], x):
            # x is held, so that its memory cannot become another tensor's
            last = self._last_selected = (x, x._version, summable(_rows(x, counted), dtype))
        return last[2]


class _Observe(torch.autograd.Function):
    """The identity on a layer's output; its backward hands (x, d) over. `anchor` makes the output require grad."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, add: Callable[..., None], call: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add, ctx.call = add, call
        return output.detach()  # no view of its own: the model may change it in place, as Falcon does

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.add(ctx.call, x, d)
        return d, None, None, None, None


def _rows(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    rows = tensor.flatten(0, -2)
    return rows if chosen is None else rows[chosen.to(rows.device)]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _compute_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """What the layer multiplies in: autocast's dtype, a quantised layer's, or its input's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    dtype = getattr(module, "compute_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else x.dtype
