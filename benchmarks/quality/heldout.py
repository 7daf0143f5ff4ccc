"""Loss and ranking accuracy on rows that are not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.errors import BenchmarkError
from benchmarks.quality.corpora import Corpus
from benchmarks.tokenized_rows import Row
from lora_da.samples.rows import collate
from lora_da.samples.tokens import IGNORED

BATCH = 16


@dataclass(frozen=True)
class Choice:
    """Where in a completion the answer's token is, and the tokens it is ranked among."""

    position: int
    tokens: tuple[int, ...]


def find_choice(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Choice | None:
    """Find what a task's answers are ranked by; None where it is no choice.

    Raises:
        BenchmarkError: one token does not tell its choices apart.
    """
    if not corpus.choices:
        return None
    encoded = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in corpus.choices]
    position = next((n for n, tokens in enumerate(zip(*encoded, strict=False)) if len(set(tokens)) > 1), 0)
    tokens = tuple(ids[position] for ids in encoded)
    if len(set(tokens)) < len(tokens):
        raise BenchmarkError(f"the choices {', '.join(map(repr, corpus.choices))} are not told apart by one token")
    return Choice(position, tokens)


class Heldout:
    """Held-out rows, in batches of like length.

    Args:
        rows: sorted by length.
        choice: what to rank; None where the task is no choice.
        device: of the model.
    """

    def __init__(self, rows: Sequence[Row], choice: Choice | None, device: torch.device) -> None:
        self._batches = [
            {key: value.to(device) for key, value in collate(rows[n : n + BATCH]).items()}
            for n in range(0, len(rows), BATCH)
        ]
        self._choice = choice

    @property
    def majority(self) -> float | None:
        """The share of the most frequent answer; None where the task is no choice."""
        if self._choice is None:
            return None
        position = self._choice.position
        answers = Counter(int(a) for batch in self._batches for a in _answers(batch["labels"], position)[1])
        return max(answers.values()) / answers.total()

    @torch.no_grad()
    def measure(self, model: PreTrainedModel) -> tuple[float, float | None]:
        """Measure the mean loss per loss token, and the share of answers ranked first among the choices.

        The model stays in train mode: its dropout is off, and bitsandbytes repacks 4-bit weights in evaluation on a
        CPU, after which no gradient passes through them.
        """
        head = model.get_output_embeddings()
        total = torch.zeros((), dtype=torch.float64)
        n_tokens, right, n_rows = 0, 0, 0
        for batch in self._batches:
            hidden = model.get_decoder()(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).last_hidden_state
            targets = batch["labels"][:, 1:]
            logits = head(hidden[:, :-1][targets != IGNORED]).float()
            loss = F.cross_entropy(logits, targets[targets != IGNORED], reduction="sum")
            total += loss.double().cpu()
            n_tokens += int((targets != IGNORED).sum())
            if self._choice is not None:
                where, answers = _answers(batch["labels"], self._choice.position)
                ranked = head(hidden[torch.arange(len(where)), where - 1])[:, list(self._choice.tokens)].argmax(1)
                right += int((torch.tensor(self._choice.tokens, device=answers.device)[ranked] == answers).sum())
                n_rows += len(answers)
        return float(total / n_tokens), right / n_rows if n_rows else None


def _answers(labels: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Find where each row's answer token is (b,), and the token (b,), by its position in the completion."""
    where = (labels != IGNORED).int().argmax(1) + position
    return where, labels[torch.arange(len(where)), where]
