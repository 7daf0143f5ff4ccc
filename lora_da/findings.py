"""What the data turned out to hold: rows that train nothing, that repeat others, that are cut off, that stand out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SAID_FROM = 0.01  # share of the rows: fewer are in the report, and no line is made of them
NAMED = 5  # rows that a sentence names
# What a sentence says of each reason's rows, one and several.
SENTENCES = {
    "masked": ("has no token that carries loss", "have no token that carries loss"),
    "duplicate": ("repeats an earlier one", "repeat earlier ones"),
    "cut": ("is cut off before its answer ends", "are cut off before their answers end"),
    "loss": ("has a loss that stands out", "have losses that stand out"),
    "gradient": ("has a gradient that stands out", "have gradients that stand out"),
    "prompt": ("has an answer that its prompt does not help", "have answers that their prompts do not help"),
}


@dataclass(frozen=True)
class Finding:
    """A row that somebody should look at.

    Args:
        row: its index in the data.
        reason: a key of `SENTENCES`.
        figures: what it was told by.
        text: the end of it, for people to find it by.
    """

    row: int
    reason: str
    figures: dict[str, float]
    text: str = ""


@dataclass(frozen=True)
class RowLoss:
    """The loss of one row, in sums over its loss tokens.

    Args:
        row: its index in the data.
        loss_tokens: of it.
        loss: of the row as it is.
        alone: the same where only its answer is read, and the token before; None where nothing else is before it.
    """

    row: int
    loss_tokens: int
    loss: float
    alone: float | None

    @property
    def mean(self) -> float:
        """Per loss token."""
        return self.loss / self.loss_tokens

    @property
    def help(self) -> float | None:
        """How much the prompt lowers the loss of its answer, summed."""
        return None if self.alone is None else self.alone - self.loss


@dataclass(frozen=True)
class DataReport:
    """What rows were looked at, and what was found.

    Args:
        rows, tokens, loss_tokens: that were looked at.
        findings: by reason, then row.
        unknown: what could not be looked for (reason → why).
        losses: of the rows that were run through the model.
        notes: sentences on rows that were gone before.
    """

    rows: int
    tokens: int
    loss_tokens: int
    findings: list[Finding] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    losses: list[RowLoss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float | None:
        """Mean loss per loss token of the rows that were run; None where none were."""
        n = sum(row.loss_tokens for row in self.losses)
        return sum(row.loss for row in self.losses) / n if n else None

    def rows_by(self, reason: str) -> list[int]:
        """The rows that were found for a reason."""
        return [finding.row for finding in self.findings if finding.reason == reason]

    def matters(self, reason: str) -> bool:
        """Whether so many rows were found that a line says so."""
        return len(self.rows_by(reason)) >= max(1, SAID_FROM * self.rows)

    def line(self) -> str | None:
        """What a user sees beside other things, where it matters; None elsewhere."""
        said = [self.sentence(reason) for reason in SENTENCES if self.matters(reason)]
        return f"LoRA-DA: of {self.rows:,} rows that were read, {'; '.join(said)}" if said else None

    def text(self) -> Iterator[str]:
        """All of it for people, line by line."""
        share = self.loss_tokens / self.tokens if self.tokens else 0.0
        yield f"LoRA-DA: {self.rows:,} rows of {self.tokens:,} tokens, of which {share:.1%} carry loss"
        if self.loss is not None:
            yield f"mean loss {self.loss:.3f} per loss token"
        found = [self.sentence(reason) for reason in SENTENCES if self.rows_by(reason)]
        yield from found or ["nothing was found in them"]
        yield from (f"not looked for, rows that {SENTENCES[reason][1]}: {why}" for reason, why in self.unknown.items())
        yield from self.notes

    def sentence(self, reason: str) -> str:
        """How many rows were found for a reason, and the first of them."""
        rows = self.rows_by(reason)
        one, several = SENTENCES[reason]
        return f"{len(rows):,} {one if len(rows) == 1 else several} ({_listed(rows)})"


def _listed(rows: Sequence[int]) -> str:
    named = ", ".join(map(str, rows[:NAMED]))
    return f"row{'' if len(rows) == 1 else 's'} {named}{', …' if len(rows) > NAMED else ''}"
