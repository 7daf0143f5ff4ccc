"""The init samples: drawn once from the user's data, by a loader of our own that leaves the user's where it was."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_da.errors import LoraDAError
from lora_da.samples.batch import BATCH_TOKENS, MOST_BATCH_TOKENS, Batch, by_length, divided
from lora_da.samples.facts import RowFacts, row_facts, rows_in
from lora_da.samples.generators import generators_kept
from lora_da.samples.source import Collate, OwnRows, n_rows_of, own_rows
from lora_da.samples.tokens import read_tokens

logger = logging.getLogger(__name__)

Read = Callable[[Mapping[str, Any], int], Batch]


@dataclass(frozen=True)
class Size:
    """How much is taken.

    Args:
        documents: to estimate on.
        tokens: that these may hold, and the others a quarter of it; the first document of each counts whatever it
            holds. Any number if None.
        others: documents besides, from the rows that follow. Where the data hold too few for both, the last rows are
            kept from the documents, up to a quarter of what there is; one at least, unless there is no second.
        large_batches: whether batches may hold `MOST_BATCH_TOKENS`, where they can be divided later.
    """

    documents: int
    tokens: int | None = None
    others: int = 0
    large_batches: bool = False


@dataclass(frozen=True)
class InitData:
    """Batches on the CPU with their counted tokens, and the size of the population they stand for.

    Args:
        batches: the batches, the longest rows first, each with at least one counted document.
        n_samples, n_tokens, n_loss_tokens: counted documents, their tokens, and those that carry loss.
        population_size: N, in documents; None where it is neither known nor needed.
        unit: what a sample is: `row`, or `document (from …)`.
        others: batches of other documents, which no statistic sees.
        row_tokens: positions in a row, on average.
        looked_at: what every row told that was met while these were drawn, those that carry no loss too.
    """

    batches: list[Batch]
    n_samples: int
    n_tokens: int
    n_loss_tokens: int
    population_size: int | None
    unit: str
    others: list[Batch] = field(default_factory=list)
    row_tokens: float = 0.0
    looked_at: list[RowFacts] = field(default_factory=list)


@dataclass(frozen=True)
class _Drawn:
    """One row of the dataset, or one ready batch: `row` is what the collator takes, `whole` if all of it counts."""

    batch: Batch
    row: Any
    whole: bool

    @property
    def n(self) -> int:
        return self.batch.tokens.n_documents


def read_causal(inputs: Mapping[str, Any], limit: int) -> Batch:
    """Count as causal language modelling does; `Task.read` of others differs."""
    return Batch(inputs, read_tokens(inputs, limit))


def draw(
    dataloader: Iterable[Mapping[str, Any]],
    size: Size,
    seed: int | None,
    population: int | None,
    read: Read,
    needs_population: bool,
) -> InitData:
    """Take the first documents of the data, or random ones if `seed` is given, and batch them by length.

    A `DataLoader` is asked for its dataset and collator: samplers and workers are not touched, and rows of like length
    are collated together whatever its batch size. Its rows are read in this process, or in one worker of our own where
    its workers begin with a `worker_init_fn`. Anything else is iterated over as it is. Random generators inside the
    dataset and the collator are left as they were; other state of theirs moves on as in any reading. Where a row of
    the dataset holds several documents, the population is the number of rows times the documents per row seen.

    Args:
        dataloader: the user's.
        size: how much to take.
        seed, population: of `LoraDAConfig`.
        read: counts what the collator made, up to so many documents.
        needs_population: whether the method asks for N.

    Raises:
        LoraDAError: empty data, all labels masked, no length where one is needed.
    """
    # A loader under another default device makes its seed there, by a generator that is here.
    with torch.device("cpu"), generators_kept(dataloader):
        return _draw(own_rows(dataloader, seed), size, population, read, needs_population)


def _draw(own: OwnRows, size: Size, population: int | None, read: Read, needs_population: bool) -> InitData:
    collate, n_rows = own.collate, own.count
    if needs_population and population is None and n_rows is None:
        raise LoraDAError(
            "the dataset has no length, so the size of the training population is unknown; set "
            "`population_size` (Axolotl: `lora_da.population_size`) to the number of documents to be trained on"
        )
    reading = _Reading(own, read)
    tokens = math.inf if size.tokens is None else size.tokens
    drawn = reading.take(size.documents, tokens)
    seen_apart = reading.take(size.others, tokens / 4)
    n_seen = sum(d.n for d in drawn + seen_apart)
    if reading.rows == 0:
        raise LoraDAError("the dataset is empty: there is nothing to estimate on")
    if n_seen == 0:
        raise LoraDAError(
            f"none of the first {reading.rows} rows has a token that carries loss: all labels are -100; check the chat "
            "template, the masking (train_on_inputs, completion_only_loss, assistant_only_loss) and the maximum length"
        )
    while len(drawn) > 1 and sum(d.n for d in seen_apart) < min(size.others, max(1, n_seen // 4)):
        seen_apart.append(drawn.pop())
    n_samples = sum(d.n for d in drawn)
    if reading.ended and n_seen < size.documents and size.tokens is None:
        logger.warning("LoRA-DA: the data hold %d samples, %d were asked for", n_seen, size.documents)
    if population is None and n_rows is not None:
        population = max(n_seen, round(n_rows * reading.documents / reading.rows))
    most = max(BATCH_TOKENS, MOST_BATCH_TOKENS) if size.large_batches else BATCH_TOKENS
    batches = _batched(drawn, collate, read, most)
    boundaries = [b.tokens.boundaries for b in batches if b.tokens.boundaries != "row"]
    return InitData(
        batches=batches,
        n_samples=n_samples,
        n_tokens=sum(b.n_counted for b in batches),
        n_loss_tokens=sum(int(b.tokens.loss_tokens.sum()) for b in batches),
        population_size=population,
        unit=f"document (from {boundaries[0]})" if boundaries else "row",
        others=_batched(seen_apart, collate, read, most),
        row_tokens=sum(d.batch.n_positions for d in drawn) / sum(d.batch.tokens.rows for d in drawn),
        looked_at=reading.looked_at,
    )


class _Reading:
    """Goes through the data once.

    Args:
        own: the data.
        read: counts what the collator made.

    Attributes:
        rows, documents: met so far.
        looked_at: what these rows told.
        ended: whether there was no more.
    """

    def __init__(self, own: OwnRows, read: Read) -> None:
        self.rows, self.documents, self.ended = 0, 0, False
        self.looked_at: list[RowFacts] = []
        self._own, self._read, self._items = own, read, iter(own.rows)

    def take(self, documents: int, tokens: float) -> list[_Drawn]:
        """The next so many with so many tokens at most, or as many as there are; what is left of a row is passed over.

        The first counts whatever it holds.
        """
        drawn: list[_Drawn] = []
        missing, collate = documents, self._own.collate
        if not documents:
            return drawn
        for item in self._items:
            inputs = _on_cpu(item if collate is None else collate([copy.deepcopy(item)]))
            batch = self._read(inputs, missing)
            found = batch.tokens.n_found
            self._look_at(inputs)
            held = _documents_within(batch, tokens, at_least=0 if drawn else 1)
            is_last = held < batch.tokens.n_documents
            if is_last and held:
                batch = self._read(inputs, held)
            self.rows += 1 if self._own.unit == "item" else n_rows_of(inputs)
            self.documents += found
            if batch.tokens.n_documents and held:
                drawn.append(_Drawn(batch, item, batch.tokens.n_documents == found))
            missing -= batch.tokens.n_documents
            tokens -= batch.n_counted
            if is_last or missing <= 0:
                return drawn
        self.ended = True
        return drawn

    def _look_at(self, inputs: Mapping[str, Any]) -> None:
        for ids, labels in rows_in(inputs):
            number = len(self.looked_at)
            order = self._own.order
            self.looked_at.append(row_facts(number if order is None else order[number], ids, labels))


def _on_cpu(inputs: Any) -> Any:
    """What a collator made, where batches are kept: under `torch.set_default_device` it may make them on a GPU."""
    if not isinstance(inputs, Mapping) or all(
        not isinstance(v, Tensor) or v.device.type == "cpu" for v in inputs.values()
    ):
        return inputs
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _documents_within(batch: Batch, tokens: float, at_least: int) -> int:
    """How many of the first documents of a batch hold so many tokens together."""
    if not batch.tokens.n_documents:
        return 0
    document = batch.tokens.document
    sizes = torch.bincount(document[document >= 0], minlength=batch.tokens.n_documents)
    return max(at_least, int((sizes.cumsum(0) <= tokens).sum()))


def _batched(drawn: list[_Drawn], collate: Collate | None, read: Read, most: int) -> list[Batch]:
    """Rows of like length collated together; ready batches, and a row that counts in part, as they are."""
    whole = [d for d in drawn if d.whole and collate is not None]
    batches = [d.batch for d in drawn if not d.whole or collate is None]
    if collate is not None:
        batches = _in_groups(whole, collate, read, most) + batches
    parts = [part for batch in batches for part in divided(batch.trimmed(), most)]
    return sorted(parts, key=lambda batch: -batch.length)


def _in_groups(whole: list[_Drawn], collate: Collate, read: Read, most: int) -> list[Batch]:
    """Rows of like length collated together, `most` tokens at a time; fewer where such a batch could not be divided
    again, or is none."""
    batches = []
    for group in by_length([d.batch.length * d.batch.shape[0] for d in whole], most):
        members = [whole[n] for n in group]
        found = _collated(members, collate, read, most) if len(members) > 1 else [members[0].batch]
        if most > BATCH_TOKENS and len(members) > 1 and (len(found) > 1 or found[0].halves() is None):
            found = _in_groups(members, collate, read, BATCH_TOKENS)
        batches += found
    return batches


def _collated(members: list[_Drawn], collate: Collate, read: Read, most: int) -> list[Batch]:
    """The rows in one batch; one by one where the collator makes something else of them together: where it cuts what it
    packs, or pads without a mask or from the left, or to a width that nothing here knows how to cut."""
    try:
        inputs = _on_cpu(collate([copy.deepcopy(d.row) for d in members]))
    except (ValueError, RuntimeError) as error:  # it took each of them alone, and a loader of single rows asks no more
        logger.info("LoRA-DA: rows go one by one, the collator does not take them together: %s", error)
        return [d.batch for d in members]
    together = read(inputs, sum(d.batch.tokens.n_documents for d in members))
    same_loss = torch.equal(together.tokens.loss_tokens, torch.cat([d.batch.tokens.loss_tokens for d in members]))
    same_tokens = together.n_counted == sum(d.batch.n_counted for d in members)
    too_large = together.trimmed().n_positions > most and together.halves() is None
    if same_loss and same_tokens and not too_large and not together.moves_positions():
        return [together]
    return [d.batch for d in members]
