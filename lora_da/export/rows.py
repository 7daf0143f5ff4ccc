"""Rows of a user's file as token ids and labels, by the model's own tokenizer and chat template.

Loss is on what the model is to say: assistant turns, completions, answers; on everything where a row is plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lora_da.errors import LoraDAError
from lora_da.samples.tokens import IGNORED

Piece = tuple[str, bool]  # a part of a text, and whether it carries loss

# Which of a row's columns are read: the first line of which it has all.
COLUMNS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("text",),
)
ONLY_TEXT = ("instruction", "output", "question", "answer", "text")
ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them


class TokenizedRows(Dataset):
    """Rows, each tokenised when it is asked for.

    Args:
        rows: with the columns of one line of `COLUMNS`, all of them the same.
        tokenizer: a fast one; with a chat template where rows hold messages.
        max_length: tokens of a row at most; what is beyond is cut off.

    Raises:
        LoraDAError: no rows, or of a kind that is not known.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not len(rows):
            raise LoraDAError("the data hold no rows")
        if not tokenizer.is_fast:
            raise LoraDAError(f"{type(tokenizer).__name__} does not say where its tokens are in the text (no fast one)")
        held = [name for name, value in _row(rows, 0).items() if value is not None]
        columns = next((c for c in COLUMNS if set(c) <= set(held)), None)
        if columns is None:
            kinds = "; ".join(" and ".join(f"`{name}`" for name in c) for c in COLUMNS)
            raise LoraDAError(f"rows hold {', '.join(f'`{n}`' for n in held)}; LoRA-DA reads rows with {kinds}")
        self._rows, self._tokenizer, self._max_length, self._columns = rows, tokenizer, max_length, columns

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        row = _row(self._rows, number)
        try:
            values = [_checked(name, row[name]) for name in self._columns]
            pieces, is_chat = self._pieces(row, *values)
            text = "".join(piece for piece, _ in pieces)
        except (KeyError, TypeError, AttributeError, TemplateError) as error:
            names = " and ".join(f"`{name}`" for name in self._columns)
            raise LoraDAError(f"row {number} cannot be read by {names}: {error!r}") from error
        except LoraDAError as error:
            raise LoraDAError(f"row {number}: {error}") from error
        # A chat template writes the special tokens itself.
        encoding = self._tokenizer(text, add_special_tokens=not is_chat, return_offsets_mapping=True, verbose=False)
        carries = [with_loss for piece, with_loss in pieces for _ in piece]  # by character
        ids = encoding["input_ids"][: self._max_length]
        spans = encoding["offset_mapping"][: self._max_length]
        labels = [i if b > a and all(carries[a:b]) else IGNORED for i, (a, b) in zip(ids, spans, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def _pieces(self, row: Mapping[str, Any], first: Any, second: Any = None) -> tuple[list[Piece], bool]:
        """The parts of a row's text, and whether a chat template has written them."""
        end = self._tokenizer.eos_token or ""
        if self._columns == ("text",):
            return [(first + end, True)], False
        if len(self._columns) == 1:
            messages = [_message(message) for message in first]
            return self._chat(messages, [n for n, m in enumerate(messages) if m["role"] == "assistant"]), True
        if self._columns == ("instruction", "output") and row.get("input"):
            first = f"{first}\n\n{_text('`input`', row['input'])}"
        if isinstance(first, list):  # prompt and completion in messages
            messages = [_message(message) for message in [*first, *second]]
            return self._chat(messages, list(range(len(first), len(messages)))), True
        if self._columns == ("prompt", "completion"):
            return [(first, False), (second + end, True)], False
        if self._tokenizer.chat_template is None:
            return [(f"{first}\n\n", False), (second + end, True)], False
        return self._chat([{"role": "user", "content": first}, {"role": "assistant", "content": second}], [1]), True

    def _chat(self, messages: list[dict[str, Any]], answers: list[int]) -> list[Piece]:
        """A conversation in pieces; the messages that are `answers` carry loss."""
        if self._tokenizer.chat_template is None:
            raise LoraDAError(
                "the rows hold messages and the tokenizer has no chat template; take the tokenizer of a chat model, or "
                "give rows with `prompt` and `completion`"
            )
        if not messages:
            raise LoraDAError("it holds no messages")
        text, pieces, done = self._written(messages), [], 0
        self._check_calls(messages, text)
        for answer in answers:
            begins = max(done, self._length(text, messages[:answer], prompt=True))
            ends = self._length(text, messages[: answer + 1])
            pieces += [(text[done:begins], False), (text[begins:ends], True)]
            done = ends
        return [*pieces, (text[done:], False)]

    def _check_calls(self, messages: list[dict[str, Any]], text: str) -> None:
        """Refuse calls of tools that the template passes over, or prints as Python does."""
        calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
        without = [{"content": "", **{k: v for k, v in m.items() if k != "tool_calls"}} for m in messages]
        if calls and (text == self._written(without) or any(str(call) in text for call in calls)):
            raise LoraDAError(
                "it holds `tool_calls`, which the chat template does not write; take a tokenizer whose template does, "
                "or give rows with `prompt` and `completion`"
            )

    def _length(self, text: str, messages: list[dict[str, Any]], prompt: bool = False) -> int:
        """How much of a conversation's text its first messages are, with the prompt for an answer if that is there."""
        beginnings = (self._written(messages, add) for add in ((True, False) if prompt else (False,)))
        found = next((len(b) for b in beginnings if text.startswith(b)), None) if messages else 0
        if found is None:
            raise LoraDAError(
                "the chat template writes earlier turns in another way when later ones follow, so that answers cannot "
                "be told from the rest; give rows of one answer each, or with `prompt` and `completion`"
            )
        return found

    def _written(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def _row(rows: Sequence[Mapping[str, Any]], number: int) -> Mapping[str, Any]:
    row = rows[number]
    if not isinstance(row, Mapping):
        raise LoraDAError(f"row {number} is a {type(row).__name__}, not an object with named values")
    return row


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Name role and content so, where they are called as in ShareGPT too; leave out what tables fill up with None."""
    if "from" in message:
        return {"role": ROLES.get(message["from"], message["from"]), "content": _content(message["value"])}
    found = {name: value for name, value in message.items() if value is not None}
    if "content" not in found and found.get("tool_calls"):
        return found
    return {**found, "content": _content(found["content"])}


def _content(value: Any) -> str:
    """The text of a message, which may be in parts: a template prints what it is given, whatever that is.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(value, list):
        return _text("a message's content", value)
    others = sorted({str(part.get("type")) for part in value if part.get("type") != "text"})
    if others:
        raise TypeError(f"a message's content has parts of type {', '.join(others)}; only text is read")
    return "".join(_text("a part of a message's content", part["text"]) for part in value)


def _checked(name: str, value: Any) -> Any:
    """A column's value: text, or messages."""
    return value if isinstance(value, list) and name not in ONLY_TEXT else _text(f"`{name}`", value)


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} is {value!r}, a {type(value).__name__} and not text")
    return value
