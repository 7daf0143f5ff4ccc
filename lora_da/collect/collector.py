"""Hooks on an ordinary forward and backward pass, or on a forward alone, that sum what the targeted layers see.

A layer's input x is kept by an autograd function wrapped around its output, and met by the output's gradient d in the
backward pass. What checkpointing computes twice is therefore counted once, re-entrant or not: only the graph that is
really backpropagated through ever reaches `backward`. Where no sum needs d, x is summed in the forward hook.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lora_da.collect.order import Chosen
from lora_da.collect.selection import Selection, same_memory
from lora_da.collect.sums import SegmentSums
from lora_da.errors import LoraDAError
from lora_da.model.experts import Routed
from lora_da.model.gradients import blocked
from lora_da.model.slices import Slice, products_told
from lora_da.products import summable

Call = tuple[str, Chosen | None]  # of a layer, and which rows of its input count; None where that cannot be told


class Collector:
    """Sums (x, d) of some layers while `observing`.

    Args:
        layers: the base layers, by name; of an expert in a parameter of many, its slice.
        sums: what is filled.
        selection: which rows count. Before a batch is announced to it, layers are looked at for inputs that they share,
            and nothing is summed.
        timed: a context to compute the products in.

    Attributes:
        overflowed: whether a float16 gradient was not finite; None where there was none.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module | Slice],
        sums: SegmentSums,
        selection: Selection,
        timed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.layers, self.sums, self.selection = layers, sums, selection
        self.overflowed: Tensor | None = None
        self._timed = timed
        self._computes_in: dict[str, torch.dtype] = {}  # layer → the dtype it casts its input to
        self._last_input: tuple[Tensor, int, str] | None = None
        self._last_selected: tuple[Tensor, int, Tensor] | None = None

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Hook the layers, and hear of products with slices."""
        slices = {layer: name for name, layer in self.layers.items() if isinstance(layer, Slice)}
        with contextlib.ExitStack() as stack:
            stack.callback(self._forget_batch)
            for name, layer in self.layers.items():
                if isinstance(layer, nn.Module):
                    stack.callback(layer.register_forward_hook(self._hook(name)).remove)
            for module in {layer.stack.module for layer in slices}:
                stack.enter_context(products_told(module, functools.partial(self._multiplied, slices)))
            stack.enter_context(self.selection.following())
            yield

    def reading(self, counted: Tensor, device: torch.device, others: Mapping[str, Tensor]) -> None:
        """Begin a batch; see `Selection.reading`."""
        self._forget_batch()
        self.selection.reading(counted, device, others)

    def look_for_overflow(self, gradient: Tensor) -> None:
        """Note in `overflowed` if a float16 gradient is not finite, without waiting for the device."""
        if gradient.dtype == torch.float16:
            overflow = ~torch.isfinite(gradient).all()
            self.overflowed = overflow if self.overflowed is None else self.overflowed.to(gradient.device) | overflow

    def _hook(self, name: str) -> Callable[..., Any]:
        def observe(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor):
                raise LoraDAError(
                    f"layer {name} ({type(module).__name__}) returns a {type(output).__name__}, and no adapter can add "
                    "to one; take it out of target_modules"
                )
            return self._observed(name, module, args[0], output)

        return observe

    def _multiplied(self, names: Mapping[Slice, str], found: Slice, x: Tensor, output: Tensor) -> Tensor:
        """What takes the place of a product's output; those of a slice that is not watched tell its expert's tokens."""
        module = found.stack.module
        if found.number is not None:
            self.selection.note_expert(Routed(module, found.number), x)
        return self._observed(names[found], module, x, output) if found in names else output

    def _observed(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """What takes the place of the output (…, o) that a layer, or a module with its slice, has made of x (…, i)."""
        backward = self.sums.needs.sums.backward
        if backward and not torch.is_grad_enabled():
            return output  # the first forward of a re-entrant checkpoint
        if backward and x.requires_grad and not output.requires_grad:
            raise blocked(name, module)
        self._note_sharing(name, x)
        if not self.selection.is_reading:
            return output
        self._computes_in[name] = _compute_dtype(module, x)
        call = name, self.selection.chosen(name, x)
        if not backward:
            self._add_input(call, x, output.shape[-1])
            return output
        anchor = torch.empty(0, device=output.device, requires_grad=True)
        wrapped: Tensor = _Observe.apply(output, anchor, x.detach(), self._add, call)
        return wrapped

    def _note_sharing(self, name: str, x: Tensor) -> None:
        """Layers that are handed the very same tensor share one Z; decided when a layer is first seen."""
        last = self._last_input  # one that was changed in place since is another
        shares_with = last[2] if last is not None and last[0] is x and last[1] == x._version else name
        known = self.sums.reads_like.setdefault(name, shares_with)
        if known != shares_with:
            raise LoraDAError(
                f"layer {name} read the same input as {known} at first and another one later; "
                "exclude it from target_modules"
            )
        self._last_input = (x, x._version, shares_with)

    def _forget_batch(self) -> None:
        self._last_input = self._last_selected = None

    def _add(self, call: Call, x: Tensor, d: Tensor) -> None:
        """Sum one call's tokens: x (…, i), d (…, o)."""
        self.look_for_overflow(d)
        name, chosen = call[0], self.selection.settled(*call, d)
        if chosen is None:
            self.sums.misshapen[name] = tuple(x.shape)
            return
        of_layer = self.sums.of(name)
        with self._timed(), torch.autocast(x.device.type, enabled=False):
            x, d = self._selected(x.detach(), d.detach(), chosen, self._computes_in[name])
            if chosen.weights is not None:
                d = d * chosen.weights.to(d).unsqueeze(1)
            if self.sums.reads_like[name] == name:
                of_layer.inputs.add(x)
            of_layer.add(x, d)

    @torch.no_grad()
    def _add_input(self, call: Call, x: Tensor, o: int) -> None:
        """Sum one call's tokens x (…, i), of which the layer makes (…, o), where no d is to come."""
        name, chosen = call[0], self.selection.settled(*call, None)
        if chosen is None:
            self.sums.misshapen[name] = tuple(x.shape)
            return
        of_layer = self.sums.of(name)
        with self._timed(), torch.autocast(x.device.type, enabled=False):
            rows = self._summable_input(x.detach(), chosen, self._computes_in[name])
            if self.sums.reads_like[name] == name:
                of_layer.inputs.add(rows)
            of_layer.note(rows, o)

    def _selected(self, x: Tensor, d: Tensor, chosen: Chosen, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The counted tokens, (n, i) and (n, o), ready to be summed; x only once for layers that share it."""
        d = summable(chosen.of(d), dtype)
        x = self._summable_input(x, chosen, dtype)
        common = torch.promote_types(x.dtype, d.dtype)
        return x.to(common), d.to(common)

    def _summable_input(self, x: Tensor, chosen: Chosen, dtype: torch.dtype) -> Tensor:
        last = self._last_selected
        if last is None or last[1] != x._version or not same_memory(last[0], x):
            # x is held, so that its memory cannot become another tensor's
            last = self._last_selected = (x, x._version, summable(chosen.of(x), dtype))
        return last[2]


class _Observe(torch.autograd.Function):
    """The identity on a layer's output; its backward hands (x, d) over. `anchor` makes the output require grad."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, add: Callable[..., None], call: Call) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add, ctx.call = add, call
        return output.detach()  # no view of its own: the model may change it in place, as Falcon does

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.add(ctx.call, x, d)
        return d, None, None, None, None


def _compute_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """What the layer multiplies in: autocast's dtype, a quantised layer's, or its input's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    dtype = getattr(module, "compute_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else x.dtype
