"""Conversations as rows: what is read, how they are written, and which tokens are an answer's."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from quantized import tiny_tokenizer

from compress.data.columns import choose
from compress.data.files import Rows
from compress.tasks.registry import get_task
from compress.tasks.token_sequences import learned_tokens, rendered, text_or_messages, token_ids
from compress.utils.errors import DataError

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cde"},
    {"role": "user", "content": "f"},
    {"role": "assistant", "content": "gh"},
]


def tokenizer(template: str | None = CHAT) -> Any:
    chat_tokenizer = tiny_tokenizer()
    chat_tokenizer.chat_template = template
    return chat_tokenizer


def spelled(made: Any, ids: Any) -> str:
    """Its tokens, a letter each; it has none for the end of a line."""
    return "".join(made.convert_ids_to_tokens(ids))


def table(*rows: Any) -> pa.Table:
    return pa.table({"text": [text_or_messages(row) for row in rows]})


def test_answers_and_what_ends_their_turns_are_learned_and_nothing_else() -> None:
    chat_tokenizer = tokenizer()
    ids, counted = learned_tokens(table(TALK), chat_tokenizer, chat_tokenizer.eos_token_id)
    whole = "<user>ab</s><assistant>cde</s><user>f</s><assistant>gh</s>"
    assert spelled(chat_tokenizer, ids) == whole
    assert spelled(chat_tokenizer, ids[counted]) == "cde</s>gh</s>"


def test_texts_end_with_a_token_and_all_of_them_is_learned() -> None:
    chat_tokenizer = tokenizer()
    ids, counted = learned_tokens(table("ab", "c"), chat_tokenizer, chat_tokenizer.eos_token_id)
    assert spelled(chat_tokenizer, ids) == "ab</s>c</s>" and counted.all()
    ids, counted = learned_tokens(table("ab", "c"), chat_tokenizer, None)
    assert spelled(chat_tokenizer, ids) == "ab<unk><unk>c" and counted.all()
    mixed, counted = learned_tokens(table("ab", TALK[:2]), chat_tokenizer, chat_tokenizer.eos_token_id)
    assert spelled(chat_tokenizer, mixed) == "ab</s><user>ab</s><assistant>cde</s>"
    assert spelled(chat_tokenizer, mixed[counted]) == "ab</s>cde</s>"


def test_what_is_judged_by_is_written_in_the_template_too() -> None:
    chat_tokenizer = tokenizer()
    assert (
        spelled(chat_tokenizer, token_ids(table(TALK[:2], "xy"), chat_tokenizer))
        == "<user>ab</s><assistant>cde</s><unk><unk>xy"
    )


@pytest.mark.parametrize("cells", [[TALK, "plain"], [json.loads(json.dumps(TALK)), "plain"]])
def test_a_column_may_hold_messages_and_text(cells: list[Any]) -> None:
    read = choose(Rows("rows.jsonl", ("text",), {"text": cells}), get_task("text-generation").columns, {})
    assert read["text"].to_pylist() == [text_or_messages(TALK), "plain"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TALK[:1], "Nobody answers in a conversation of 1 messages"),
        ([{"role": "assistant", "content": " "}], "Nobody answers"),
        ([{"role": "robot", "content": "a"}], "the role 'robot'"),
    ],
)
def test_conversations_without_an_answer_are_refused_by_row(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        choose(Rows("rows.jsonl", ("text",), {"text": ["fine", value]}), get_task("text-generation").columns, {})
    assert "rows.jsonl" in caught.value.what


@pytest.mark.parametrize("value", [7, [], ["a"], [{"role": "user"}], {"role": "user", "content": "a"}])
def test_what_is_neither_text_nor_messages_is_a_wrong_type(value: Any) -> None:
    with pytest.raises(TypeError):
        text_or_messages(value)


def test_a_missing_template_and_one_that_cannot_be_followed_are_named() -> None:
    row = text_or_messages(TALK)
    assert row is not None
    with pytest.raises(DataError, match="no chat template"):
        rendered(row, tokenizer(None))
    last = "{% for message in messages %}{% if loop.last %}<last>{% endif %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="changes messages once others follow"):
        rendered(row, tokenizer(last))
    with pytest.raises(DataError, match="refuses a conversation: no"):
        rendered(row, tokenizer("{{ raise_exception('no') }}"))
