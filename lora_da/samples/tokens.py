"""Which tokens of a batch count, and to which document each belongs.

A sample is a document. In a packed row the documents are told apart by `position_ids` that start anew, by
`cu_seq_lens_q`, `seq_lengths` or `seq_idx`, or by an `attention_mask` that numbers them (Axolotl's multipack);
elsewhere a row is a document, and where rows are judged in pairs a pair is. Padding never counts, nor does a document
in which nothing carries loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_da.errors import LoraDAError

IGNORED = -100


@dataclass(frozen=True)
class BatchTokens:
    """The tokens of one batch, flattened to `p = rows · columns` positions.

    Args:
        targets: (p,) the label each position predicts, -100 where none; everywhere where documents have labels as
            a whole.
        document: (p,) number of the counted document a position belongs to, -1 where it does not count.
        loss_tokens: (documents,) loss tokens of each counted document, all at least 1; 1 where it has one label.
        n_found: documents that carry loss, those beyond the limit too.
        boundaries: where the document boundaries were read from; `row` if nowhere.
        rows: of the batch.
    """

    targets: Tensor
    document: Tensor
    loss_tokens: Tensor
    n_found: int
    boundaries: str
    rows: int

    @property
    def n_documents(self) -> int:
        return len(self.loss_tokens)


def read_tokens(batch: Mapping[str, Any], limit: int, shifted: bool = True) -> BatchTokens:
    """Count a batch's tokens; documents beyond the first `limit` that carry loss do not count.

    Args:
        batch: the collator's output.
        limit: of documents.
        shifted: whether token t predicts label t + 1, or its own.

    Raises:
        LoraDAError: no labels, or an attention mask that does not tell padding from text.
    """
    labels = _labels(batch)
    real = real_tokens(batch, labels, "labels")
    starts, boundaries = _document_starts(batch, labels, real)
    targets = labels.masked_fill(~real, IGNORED)
    if shifted:
        predicted = targets.masked_fill(starts, IGNORED)  # a document's first token is not
        targets = torch.full_like(labels, IGNORED)
        targets[:, :-1] = predicted[:, 1:]  # the logits of token t are compared with label t + 1
    document = starts.flatten().cumsum(0) - 1  # (p,)
    document[~real.flatten()] = -1
    targets = targets.flatten()
    targets[document < 0] = IGNORED

    loss_tokens = torch.bincount(document[targets != IGNORED], minlength=int(starts.sum()))
    document, kept, n_found = _counted(document, loss_tokens, limit)
    targets[document < 0] = IGNORED
    return BatchTokens(targets, document, kept, n_found, boundaries, len(labels))


def read_labelled_rows(batch: Mapping[str, Any], labelled: Tensor, limit: int) -> BatchTokens:
    """Count the tokens of a batch whose documents have one label each; those beyond the first `limit` do not count.

    Args:
        batch: the collator's output, the rows of a document beside each other.
        labelled: (documents,) bool, whether a document carries loss.
        limit: of documents.

    Raises:
        LoraDAError: no token ids, or an attention mask that does not tell padding from text.
    """
    ids = batch["input_ids"]
    real = real_tokens(batch, ids, "input_ids")  # (rows, columns)
    number = (
        torch.arange(len(labelled), device=labelled.device).repeat_interleave(len(ids) // len(labelled)).unsqueeze(1)
    )  # (rows, 1)
    document, kept, n_found = _counted(number.where(real, -1).flatten(), labelled.long(), limit)
    return BatchTokens(torch.full_like(document, IGNORED), document, kept, n_found, "row", len(ids))


def _counted(document: Tensor, loss_tokens: Tensor, limit: int) -> tuple[Tensor, Tensor, int]:
    """The first `limit` documents with loss, numbered anew; their loss tokens; how many there are beyond the limit too.

    Args:
        document: (p,) number of the document a position belongs to, -1 where it is padding.
        loss_tokens: (documents,).
    """
    found = loss_tokens.nonzero().flatten()
    kept = found[:limit]
    number = torch.full((len(loss_tokens) + 1,), -1, device=document.device)  # the last entry maps -1 to itself
    number[kept] = torch.arange(len(kept), device=document.device)
    return number[document], loss_tokens[kept], len(found)


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if not isinstance(batch, Mapping):
        raise LoraDAError(
            f"a batch is a {type(batch).__name__}, expected a mapping with `labels`, as the model's forward takes it"
        )
    labels = batch.get("labels")
    if labels is None:
        raise LoraDAError(
            f"the batches have no `labels` (keys seen: {', '.join(map(str, batch))}); use a collator that adds them, "
            "e.g. transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise LoraDAError(f"`labels` have shape {shape}; LoRA-DA needs one label per token, (rows, tokens)")
    return labels.cpu()


def real_tokens(batch: Mapping[str, Any], ids: Tensor, name: str) -> Tensor:
    """(rows, columns) bool, false at padding.

    Args:
        batch: the collator's output.
        ids: (rows, columns), what the mask must fit.
        name: of `ids`.

    Raises:
        LoraDAError: an attention mask of another shape.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        seen = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise LoraDAError(
            f"`attention_mask` has {seen}, `{name}` shape {tuple(ids.shape)}: padding cannot be told "
            "from text; let the collator give a (rows, tokens) mask, or none and `position_ids` that start anew"
        )
    return mask.cpu() != 0


def _document_starts(batch: Mapping[str, Any], labels: Tensor, real: Tensor) -> tuple[Tensor, str]:
    """(rows, columns) bool, true at the first token of each document, and where that was read from."""
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :1] = True  # a row may be empty
    found = []
    for name, starts in (
        ("position_ids", _starts_by_positions(batch.get("position_ids"), labels)),
        ("cu_seq_lens_q", _starts_by_offsets(batch.get("cu_seq_lens_q"), labels)),
        ("seq_lengths", _starts_by_lengths(batch.get("seq_lengths"), labels)),
        ("seq_idx", _starts_by_change(batch.get("seq_idx"), labels)),
        ("attention_mask", _starts_by_change(batch.get("attention_mask"), labels)),
    ):
        if starts is None:
            continue
        if name == "attention_mask" and not (batch["attention_mask"] > 1).any():
            continue  # an ordinary padding mask: where it changes, padding begins, not a document
        rows |= starts
        if bool((starts & real)[:, 1:].any()):
            found.append(name)
    packed = bool(((rows & real).sum(1) > 1).any())  # padding is no document
    return rows, found[0] if packed else "row"


def _starts_by_positions(positions: Any, labels: Tensor) -> Tensor | None:
    """True where a position is not above its left neighbour. One that jumps goes on with the same document, as it does
    in the loss that training takes; the first column is left to the caller."""
    steps = _steps(positions, labels)
    return None if steps is None else steps <= 0


def _starts_by_change(values: Any, labels: Tensor) -> Tensor | None:
    """True where a value is not its left neighbour's; the first column is left to the caller."""
    steps = _steps(values, labels)
    return None if steps is None else steps != 0


def _steps(values: Any, labels: Tensor) -> Tensor | None:
    """(rows, columns) how far each value is above its left neighbour; in the first column what starts nothing."""
    if not isinstance(values, Tensor) or values.shape not in (labels.shape, (1, labels.shape[1])):
        return None
    steps = torch.zeros_like(labels)
    steps[:, 1:] = values.cpu().diff(dim=1)
    return steps


def _starts_by_offsets(offsets: Any, labels: Tensor) -> Tensor | None:
    if not isinstance(offsets, Tensor) or offsets.dim() != 1:
        return None
    starts = torch.zeros(labels.numel() + 1, dtype=torch.bool, device=labels.device)
    starts[offsets.cpu().long()] = True
    return starts[:-1].view_as(labels)


def _starts_by_lengths(lengths: Any, labels: Tensor) -> Tensor | None:
    if lengths is None or len(lengths) != labels.shape[0]:
        return None
    starts = torch.zeros_like(labels, dtype=torch.bool)
    for row, row_lengths in zip(starts, lengths, strict=True):
        ends = torch.as_tensor(row_lengths, device="cpu").cumsum(0)
        row[ends[ends < len(row)]] = True
    return starts
