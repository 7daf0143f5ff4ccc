"""A decoder as a sequence of blocks, of which some can be run without the others.

To run blocks a … b again from the hidden state that entered block a, the decoder itself is called: it makes masks,
position embeddings and everything else its blocks are given, whatever the architecture. The blocks before a and from b
on hand their input through, and block a is given the hidden state. That this is the whole of a block's input is not
assumed: `learn` sees each block take the very tensor that the one before returned, and follows the graph of what it
returns for paths around that tensor; `check` compares what comes out later with what came out first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_da.model.forward import kept_on_device, replaced, without_its_inputs
from lora_da.samples.batch import NOT_TEXT

# A block run again in another kernel than the first time is off by rounding, one that lacks an input by its own size.
REPLAY_TOLERANCE = 0.05

Keep: TypeAlias = Callable[[Tensor], object]  # is given a hidden state


class NotSequential(Exception):
    """Blocks that are no sequence in which each depends on the one before alone; the message says why."""


def find_blocks(decoder: nn.Module) -> list[nn.Module]:
    """A decoder's blocks, lowest first: its longest list of modules that is not inside another; none if unknown."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer, _ in lists):
            lists.append((name, module))
    return list(max((m for _, m in lists), key=len, default=[]))


class BlockSequence:
    """Runs some blocks of a decoder.

    Args:
        decoder: what makes hidden states of a batch's inputs; what a model has before its decoder may be part of it.
        blocks: its blocks.
    """

    def __init__(self, decoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._decoder, self._blocks = decoder, blocks
        self._beside: list[int | None] = [None] * len(blocks)  # what a tuple holds beside the hidden state
        self._leaves: list[Tensor] | None = None  # while learning: what entered each block so far, cut from its graph
        self._first, self._stop, self._again = 0, len(blocks), False
        self._call = _Call(None, {})

    def __len__(self) -> int:
        return len(self._blocks)

    def learn(self, gradients: bool, **inputs: Any) -> Tensor:
        """Run all blocks, to see that they are a sequence and what they return; the hidden state behind the last.

        Then each alone, after a run over other tokens: what a block left lying for another one is stale by then.

        Args:
            gradients: whether there are graphs to follow; where no backward pass is to come, the runs alone decide.
            inputs: of the decoder.

        Raises:
            NotSequential: they are not.
        """
        self._leaves = []
        try:
            with torch.set_grad_enabled(gradients), self.only(0, len(self)), kept_on_device():
                last = self.run(None, {}, **inputs).detach()
            entered = [leaf.detach() for leaf in self._leaves] + [last]
        finally:
            self._leaves = None
        with torch.no_grad():
            self._decoder(**_other_than(inputs))
            for number in reversed(range(len(self))):  # what a block leaves would be fresh again for those above it
                self._check_alone(number, entered[number], entered[number + 1], inputs)
        return last

    def _check_alone(self, number: int, hidden: Tensor, returned: Tensor, inputs: dict[str, Any]) -> None:
        def refusal(error: Exception) -> Exception:
            return NotSequential(f"block {number} cannot be run alone: {error}")

        with without_its_inputs(refusal), self.only(number, number + 1):
            again = self.run(hidden, {}, **inputs)
        check(again, returned)

    @contextlib.contextmanager
    def only(self, first: int, stop: int, again: bool = False) -> Iterator[None]:
        """The decoder runs blocks `first` … `stop` − 1 alone while the context is open.

        Args:
            first, stop: numbers of blocks.
            again: whether a backward computes each block's activations again, from the hidden state that entered it.
        """
        self._first, self._stop, self._again = first, stop, again
        with contextlib.ExitStack() as stack:
            for number, block in enumerate(self._blocks):
                stack.enter_context(replaced(block, self._forward(number, block.forward)))
            try:
                yield
            finally:
                self._call, self._again = _Call(None, {}), False

    def run(self, hidden: Tensor | None, keep: Mapping[int, Keep], **inputs: Any) -> Tensor:
        """Call the decoder; the hidden state that left the last block that ran.

        Args:
            hidden: what enters the first block that runs; None: what the decoder makes.
            keep: who is given the hidden state that enters a block, as soon as it is there, by the block's number.
            inputs: of the decoder.
        """
        with self.given(hidden, keep):
            self._decoder(**inputs)
            call = self._call
            if call.expected != len(self):
                raise NotSequential(f"{call.expected} of its {len(self)} blocks ran")
            assert call.left is not None, "all blocks ran"
            return call.left

    @torch.no_grad()
    def entering(self, start: int, hidden: Tensor | None, **inputs: Any) -> Tensor:
        """What enters the first block that `only` runs, from what enters block `start` below it; see `run`."""
        first, stop = self._first, self._stop
        self._first, self._stop = start, first
        try:
            return self.run(hidden, {}, **inputs)
        finally:
            self._first, self._stop = first, stop

    @contextlib.contextmanager
    def given(self, hidden: Tensor | None, keep: Mapping[int, Keep]) -> Iterator[None]:
        """Do as `run` does, for a caller that calls the model itself, once."""
        self._call = _Call(hidden, keep)
        try:
            yield
        finally:
            self._call = _Call(None, {})

    def _forward(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, hidden = self._call, args[0] if args else kwargs.get("hidden_states")
            if number != call.expected:
                raise NotSequential(f"block {number} runs where block {call.expected} is expected")
            if not isinstance(hidden, Tensor) or (number and hidden is not call.passed):
                raise NotSequential(f"block {number} does not read what block {number - 1} returns")
            call.expected += 1
            if number == self._first and call.given is not None:
                hidden = call.given.clone()  # a block may change its input in place, and this one is needed again
            if number in call.keep:
                call.keep[number](hidden.clone())
            if self._first <= number < self._stop:
                output = self._run(number, original, hidden, args, kwargs)
            else:
                beside = self._beside[number]
                output = hidden if beside is None else (hidden, *(None,) * beside)
            call.passed = output[0] if isinstance(output, tuple) else output
            if number + 1 == self._stop:
                call.left = call.passed
            return output

        return forward

    def _run(self, number: int, original: Callable[..., Any], hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._leaves is not None:
            hidden = hidden if number else hidden.detach().requires_grad_()
            self._leaves.append(hidden)
            hidden = hidden.clone()
        again = self._again and torch.is_grad_enabled()
        block = partial(checkpoint, original, use_reentrant=False, preserve_rng_state=False) if again else original
        output = block(hidden, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": hidden})
        returned = output[0] if isinstance(output, tuple) else output
        if not isinstance(returned, Tensor) or returned.shape != hidden.shape or hidden.dim() != 3:
            raise NotSequential(f"block {number} does not read and return one hidden state (rows, columns, h)")
        self._beside[number] = len(output) - 1 if isinstance(output, tuple) else None
        if self._leaves is None:
            return output
        self._look_for_ways_around(number, returned, self._leaves[:-1])
        cut = returned.detach().requires_grad_()
        return (cut, *output[1:]) if isinstance(output, tuple) else cut

    def _look_for_ways_around(self, number: int, returned: Tensor, entered: list[Tensor]) -> None:
        """Whether a block's output depends on anything that entered an earlier block, other than by its own input."""
        if entered and returned.requires_grad:
            found = torch.autograd.grad(returned.sum(), entered, allow_unused=True)
            earlier = [other for other, gradient in enumerate(found) if gradient is not None]
            if earlier:
                raise NotSequential(
                    f"block {number} reads something of block {earlier[0]} past the hidden state between"
                )


class _Call:
    """What is known while the decoder is called once.

    Args:
        given: what enters the first block that runs; what the decoder makes if None.
        keep: who is given what enters a block, by its number.

    Attributes:
        expected: the block to run next.
        passed: what the last one returned.
        left: what the last one that was to run returned.
    """

    def __init__(self, given: Tensor | None, keep: Mapping[int, Keep]) -> None:
        self.given, self.keep = given, keep
        self.expected = 0
        self.passed: Tensor | None = None
        self.left: Tensor | None = None


def _other_than(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the same shapes: other tokens, or other images, for which the tokens say where they are, or others in
    the place of both."""
    images = {
        k: v.flip(-1) / 2 for k, v in inputs.items() if (NOT_TEXT.match(k) or k == "inputs_embeds") and _is_floating(v)
    }
    if images or not isinstance(inputs.get("input_ids"), Tensor):
        return {**inputs, **images}
    return {**inputs, "input_ids": inputs["input_ids"].flip(-1) // 2}


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def check(again: Tensor, before: Tensor) -> None:
    """Refuse a sequence whose blocks, run again, do not give what they gave.

    Raises:
        NotSequential: the difference is more than rounding.
    """
    off = torch.linalg.vector_norm(again.float() - before.float()) / torch.linalg.vector_norm(before.float())
    if not off <= REPLAY_TOLERANCE:
        raise NotSequential(f"its blocks, run again from their input alone, are off by {off:.2g}")
