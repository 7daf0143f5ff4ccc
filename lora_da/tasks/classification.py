"""Classification and regression, of whole rows or of their tokens, with the model's own loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from transformers import PreTrainedModel

from lora_da.errors import LoraDAError
from lora_da.model.forward import logits_of, loss_of
from lora_da.samples.batch import Batch
from lora_da.samples.tokens import IGNORED, read_labelled_rows, read_tokens
from lora_da.tasks.head import LossPass
from lora_da.tasks.task import Task


class _Classification(Task):
    """A body with a head of a few outputs, whose loss is the mean over what has a label.

    Raises:
        LoraDAError: the model names no body.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.base_model is model:
            raise LoraDAError(f"{type(model).__name__} names no body (`base_model_prefix`) beneath its head")
        super().__init__(model, model.base_model)

    @property
    def n_logits(self) -> int:
        return int(self.model.num_labels)

    def _backward(
        self, inputs: dict[str, Any], labels: Tensor, n: int, weights: Tensor | None, how: LossPass
    ) -> Tensor:
        """Run a batch of `n` labels that count; weights (…, 1), in the place of the pass's own, fit the logits."""
        with how.timed("forward"):
            output = self.model(**inputs, labels=labels if n else None)  # the mean over no label is not a number
        loss = loss_of(output) if n else None
        if n and loss is None:
            raise self._no_loss()
        logits = logits_of(output, with_loss=n > 0)
        if torch.is_grad_enabled():
            made: Tensor | GradientEdge = logits
            with how.timed("head"):
                gradient = torch.zeros_like(logits)
                if loss is not None:
                    made, gradient = self._of_logits(loss * n * how.scale, logits)
                if weights is not None:
                    gradient = (gradient * weights.to(gradient.device)).to(gradient.dtype)
            if logits.requires_grad:
                with how.timed("backward"):
                    torch.autograd.backward(made, gradient)
        return logits.new_zeros((), dtype=torch.float32) if loss is None else loss.detach().float() * n

    def _of_logits(self, loss: Tensor, logits: Tensor) -> tuple[Tensor | GradientEdge, Tensor]:
        """The gradient of the loss in the logits, and where in the graph it enters. A label's loss depends on its own
        logits alone: to weigh this gradient is to weigh the loss."""
        # A model on several devices returns its loss beside a copy of the logits that this was made of.
        sources = () if logits.grad_fn is None else logits.grad_fn.next_functions[:1]
        found: list[Tensor | GradientEdge] = [logits]
        found += [GradientEdge(node, number) for node, number in sources if node is not None]
        for made in found:
            (gradient,) = torch.autograd.grad(loss, made, allow_unused=True)
            if gradient is not None and gradient.shape == logits.shape:
                return made, gradient
        raise self._no_loss()

    def _no_loss(self) -> LoraDAError:
        return LoraDAError(f"{type(self.model).__name__} returns no loss that is made of its logits; not supported")


class SequenceClassification(_Classification):
    """One label, one vector of labels or one number for each row, which is a document with one loss token.

    Raises:
        LoraDAError: the model names no body, or no padding token to find the end of a row by.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        if model.config.get_text_config().pad_token_id is None:
            raise LoraDAError(
                f"{type(model).__name__} has no pad_token_id in its config, so rows of different lengths cannot be run "
                "together; set model.config.pad_token_id to the tokenizer's"
            )

    def read(self, inputs: Mapping[str, Any], limit: int) -> Batch:
        labels = _row_labels(inputs)
        labelled = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        if self._is_single_label(labels):
            labelled = (labels.view(len(labels), -1) != IGNORED).all(1).cpu()
        tokens = read_labelled_rows(inputs, labelled, limit)
        # The loss is a mean over all rows, so no other may be among them.
        return Batch(inputs, tokens, by_row=frozenset({"labels"})).counted_rows()

    def backward(self, batch: Batch, inputs: dict[str, Any], how: LossPass) -> Tensor:
        labels = batch.inputs["labels"].to(inputs["input_ids"].device)
        # One loss token in every document: however they are averaged, all weights are 1.
        return self._backward(inputs, labels, batch.tokens.n_documents, None, how)

    def _is_single_label(self, labels: Tensor) -> bool:
        """Decide as transformers does where the config says nothing."""
        kind = self.model.config.problem_type
        if kind is None:
            return self.model.num_labels > 1 and labels.dtype in (torch.long, torch.int)
        return bool(kind == "single_label_classification")


class TokenClassification(_Classification):
    """A label for each token, its own and not the next one's. A document is a row, or a part of a packed one."""

    def read(self, inputs: Mapping[str, Any], limit: int) -> Batch:
        return Batch(inputs, read_tokens(inputs, limit, shifted=False))

    def backward(self, batch: Batch, inputs: dict[str, Any], how: LossPass) -> Tensor:
        labels = batch.tokens.targets.view(batch.shape).to(inputs["input_ids"].device)
        weights = None if how.weights is None else how.weights.view(*batch.shape, 1)
        return self._backward(inputs, labels, int(batch.tokens.loss_tokens.sum()), weights, how)


def _row_labels(inputs: Mapping[str, Any]) -> Tensor:
    """(rows,) or (rows, k)."""
    if not isinstance(inputs, Mapping):
        raise LoraDAError(
            f"a batch is a {type(inputs).__name__}, expected a mapping with `labels`, as the model's forward takes it"
        )
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not isinstance(labels, Tensor):
        raise LoraDAError(
            f"the batches have no `input_ids` (rows, tokens) with `labels` (keys seen: {', '.join(map(str, inputs))}); "
            "use a collator that makes both, e.g. transformers.DataCollatorWithPadding(tokenizer)"
        )
    if labels.dim() not in (1, 2) or len(labels) != len(ids):
        raise LoraDAError(
            f"`labels` have shape {tuple(labels.shape)} for {len(ids)} rows; a sequence classifier needs (rows,), or "
            "(rows, k) for several labels or numbers a row"
        )
    return labels
