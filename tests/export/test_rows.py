"""A user's rows as tokens and labels: the words that carry loss are those of the answers, in every format there is."""

from __future__ import annotations

import pytest
import torch
from words import TEMPLATE, WORDS, tokenizer

from lora_da import LoraDAError
from lora_da.export.rows import TokenizedRows
from lora_da.samples.rows import collate

# As some models' do: what an earlier turn says depends on whether later ones follow.
FORGETFUL = TEMPLATE.replace(
    "m['content'] }}", "('...' if m['role'] == 'assistant' and not loop.last else m['content']) }}"
)
# Nor is its prompt for an answer what stands before one.
THINKING = TEMPLATE.replace("{{ '<assistant> ' }}", "{{ '<assistant> <think> ' }}")


def read(row, max_length=100, **options):
    """The row's words, those that carry loss in capitals."""
    found = TokenizedRows([row], tokenizer(**options), max_length)[0]
    assert all(label in (-100, i) for i, label in zip(found["input_ids"], found["labels"], strict=True))
    pairs = zip(found["input_ids"], found["labels"], strict=True)
    return " ".join(WORDS[i].upper() if label != -100 else WORDS[i] for i, label in pairs)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


ONE = chat(("user", "a b"), ("assistant", "c d"))
TWO = chat(("system", "g"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e"))
SHARE_GPT = [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d"}]

FORMATS = {
    "messages": ({"messages": ONE}, "<user> a b <assistant> C D <EOS>"),
    "two answers": (
        {"messages": TWO},
        "<system> g <user> a <assistant> B <EOS> <user> c <assistant> D E <EOS>",
    ),
    "a last turn of the user's": (
        {"messages": [*ONE, *chat(("user", "f"))]},
        "<user> a b <assistant> C D <EOS> <user> f",
    ),
    "an answer first": ({"messages": chat(("assistant", "a"), ("user", "b"))}, "<ASSISTANT> A <EOS> <user> b"),
    "as tables fill them up": (
        {"messages": [{**m, "tool_calls": None} for m in ONE], "text": None},
        "<user> a b <assistant> C D <EOS>",
    ),
    "ShareGPT": ({"conversations": SHARE_GPT}, "<user> a b <assistant> C D <EOS>"),
    "prompt and completion": ({"prompt": "a b", "completion": " c d"}, "a b C D <EOS>"),
    "in messages": (
        {"prompt": TWO[:4], "completion": TWO[4:]},
        "<system> g <user> a <assistant> b <eos> <user> c <assistant> D E <EOS>",
    ),
    "Alpaca": ({"instruction": "a", "input": "b", "output": "c"}, "<user> a b <assistant> C <EOS>"),
    "Alpaca without input": ({"instruction": "a", "input": "", "output": "c"}, "<user> a <assistant> C <EOS>"),
    "question and answer": ({"question": "a", "answer": "c"}, "<user> a <assistant> C <EOS>"),
    "text": ({"text": "a b c"}, "A B C <EOS>"),
    "messages before text": ({"text": "e f", "messages": ONE}, "<user> a b <assistant> C D <EOS>"),
}


@pytest.mark.compat("command-rows")
@pytest.mark.parametrize("kind", FORMATS)
def test_answers_carry_loss(kind):
    row, expected = FORMATS[kind]
    assert read(row) == expected


def test_special_tokens_are_written_once():
    """By the template, or by the tokenizer where there is none: what it puts first carries no loss."""
    assert read({"text": "a b"}, begins=True) == "<bos> A B <EOS>"
    assert read({"prompt": "a", "completion": " b"}, begins=True) == "<bos> a B <EOS>"
    assert read({"messages": ONE}, begins=True) == "<user> a b <assistant> C D <EOS>"


def test_without_a_template_two_parts_are_text():
    for row in ({"question": "a", "answer": "b"}, {"instruction": "a", "output": "b"}):
        assert read(row, template=None) == "a B <EOS>"
    with pytest.raises(LoraDAError, match="^row 0: the rows hold messages and the tokenizer has no chat template"):
        read({"messages": ONE}, template=None)


def test_rows_are_cut():
    assert read({"messages": ONE}, max_length=5) == "<user> a b <assistant> C"
    assert read({"messages": ONE}, max_length=2) == "<user> a"


def test_templates_that_write_a_turn_in_two_ways():
    assert read({"messages": ONE}, template=FORGETFUL) == "<user> a b <assistant> C D <EOS>"
    with pytest.raises(LoraDAError, match="^row 0: the chat template writes earlier turns in another way"):
        read({"messages": TWO}, template=FORGETFUL)
    # What marks the answer is then a part of it.
    assert read({"messages": ONE}, template=THINKING) == "<user> a b <ASSISTANT> C D <EOS>"


REFUSED = {
    "no rows": ([], r"^the data hold no rows"),
    "unknown columns": ([{"a": 1, "b": 2}], r"^rows hold `a`, `b`; LoRA-DA reads rows with `messages`; .*; `text`$"),
    "no object": (["a b"], r"^row 0 is a str, not an object"),
    "a row of other columns": (
        [{"text": "a"}, {"prompt": "a"}],
        r"^row 1 cannot be read by `text`: KeyError\('text'\)",
    ),
    "a number": ([{"text": 3}], r"^row 0 cannot be read by `text`: TypeError"),
    "no messages": ([{"messages": "hello"}], r"^row 0 cannot be read by `messages`: "),
    "a message without content": ([{"messages": [{"role": "user"}]}], r"^row 0 cannot be read by `messages`: "),
    "a missing answer": (
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
        r"^row 1 cannot be",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_cannot_be_read(kind):
    rows, message = REFUSED[kind]
    with pytest.raises(LoraDAError, match=message):
        list(map(TokenizedRows(rows, tokenizer(), 10).__getitem__, range(len(rows))))


PRINTS = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"  # whatever it is given
PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize("template", [TEMPLATE, PRINTS])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS[1:]}]},
        {"conversations": [{"from": "human", "value": PARTS}, {"from": "gpt", "value": PARTS[1:]}]},
        {"prompt": [{"role": "user", "content": PARTS}], "completion": [{"role": "assistant", "content": PARTS[1:]}]},
    ],
    ids=lambda row: next(iter(row)),
)
def test_text_in_parts_is_the_text(row, template):
    plain = {"messages": chat(("user", "a b"), ("assistant", "b"))}
    assert TokenizedRows([row], tokenizer(template), 100)[0] == TokenizedRows([plain], tokenizer(template), 100)[0]


NO_TEXT = {
    "number": 3,
    "fraction": 0.5,
    "truth": True,
    "object": {"text": "a"},
    "null": None,
    "image": [{"type": "image_url", "image_url": {"url": "a"}}],
    "image among text": [*PARTS, {"type": "image"}],
    "part without text": [{"type": "text"}],
    "part with a number": [{"type": "text", "text": 3}],
    "list of words": ["a", "b"],
}


PLACES = "messages answer conversations prompt question input output text".split()
# An `input` of null is how tables fill one up that is not there.
REFUSED_VALUES = [(place, kind) for place in PLACES for kind in NO_TEXT if (place, kind) != ("input", "null")]


@pytest.mark.parametrize(("place", "kind"), REFUSED_VALUES)
def test_what_is_no_text_is_refused_by_the_row(place, kind):
    """A template would print it as Python does."""
    value = NO_TEXT[kind]
    turn, answer = {"role": "user", "content": value}, {"role": "assistant", "content": "a"}
    rows = {
        "messages": {"messages": [turn, answer]},
        "answer": {"messages": [answer, {**answer, "content": value}]},
        "conversations": {"conversations": [{"from": "human", "value": value}]},
        "prompt": {"prompt": [turn], "completion": [answer]},
        "question": {"question": value, "answer": "a"},
        "input": {"instruction": "a", "input": value, "output": "a"},
        "output": {"instruction": "a", "output": value},
        "text": {"text": value},
    }
    good = {name: ONE if name in ("messages", "prompt", "completion") else "a" for name in rows[place]}
    good |= {"conversations": SHARE_GPT} if place == "conversations" else {}
    found = TokenizedRows([good, rows[place]], tokenizer(PRINTS), 100)
    assert found[0]["input_ids"]
    with pytest.raises(LoraDAError, match="^row 1 cannot be read by "):
        found[1]


@pytest.mark.parametrize("row", [{"messages": []}, {"conversations": []}, {"prompt": [], "completion": []}])
def test_a_row_without_messages_is_refused(row):
    with pytest.raises(LoraDAError, match="^row 0: it holds no messages"):
        TokenizedRows([row], tokenizer(), 100)[0]


CALLS = [{"type": "function", "function": {"name": "c", "arguments": {"d": "e"}}}]
WRITES_CALLS = TEMPLATE.replace(
    "m['content'] }}",
    "m['content'] }}{% for c in m['tool_calls'] or [] %}{{ ' ' + c['function']['name'] }}{% endfor %}",
)


@pytest.mark.parametrize("content", ["a", "", None])
def test_calls_of_tools_are_read_where_the_template_writes_them(content):
    answer = {"role": "assistant", "content": content, "tool_calls": CALLS}
    row = {"messages": [*chat(("user", "b")), answer]}
    if content is not None:
        assert "C" in read(row, template=WRITES_CALLS).split()
    for template in (TEMPLATE, PRINTS + "{{ messages[-1]['tool_calls'] }}"):
        with pytest.raises(LoraDAError, match="^row 0(: it holds `tool_calls`| cannot be read by `messages`)"):
            read(row, template=template)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(LoraDAError, match="^Slow does not say where its tokens are"):
        TokenizedRows([{"text": "a"}], Slow(), 10)


def test_batches_are_padded_on_the_right():
    batch = collate([{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}, {"input_ids": [5], "labels": [5]}])
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9], [5, -100, -100]]
    assert all(value.dtype == torch.long for value in batch.values())
