"""Tests of conversations as rows: accepted types, the chat template, and which tokens are trained on."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from quantized import tiny_tokenizer

from compress.data.columns import choose
from compress.data.files import Rows
from compress.tasks.registry import TASKS
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
    """Join the tokens of ``ids``, which are single letters; a line break has no token."""
    return "".join(made.convert_ids_to_tokens(ids))


def table(*rows: Any) -> pa.Table:
    return pa.table({"text": [text_or_messages(row) for row in rows]})


def test_only_assistant_turns_and_their_end_tokens_are_trained_on() -> None:
    chat_tokenizer = tokenizer()
    ids, counted = learned_tokens(table(TALK), chat_tokenizer, chat_tokenizer.eos_token_id)
    whole = "<user>ab</s><assistant>cde</s><user>f</s><assistant>gh</s>"
    assert spelled(chat_tokenizer, ids) == whole
    assert spelled(chat_tokenizer, ids[counted]) == "cde</s>gh</s>"


def test_plain_texts_get_end_token_and_are_trained_on_entirely() -> None:
    chat_tokenizer = tokenizer()
    ids, counted = learned_tokens(table("ab", "c"), chat_tokenizer, chat_tokenizer.eos_token_id)
    assert spelled(chat_tokenizer, ids) == "ab</s>c</s>" and counted.all()
    ids, counted = learned_tokens(table("ab", "c"), chat_tokenizer, None)
    assert spelled(chat_tokenizer, ids) == "ab<unk><unk>c" and counted.all()
    mixed, counted = learned_tokens(table("ab", TALK[:2]), chat_tokenizer, chat_tokenizer.eos_token_id)
    assert spelled(chat_tokenizer, mixed) == "ab</s><user>ab</s><assistant>cde</s>"
    assert spelled(chat_tokenizer, mixed[counted]) == "ab</s>cde</s>"


def test_evaluation_text_uses_chat_template() -> None:
    chat_tokenizer = tokenizer()
    assert (
        spelled(chat_tokenizer, token_ids(table(TALK[:2], "xy"), chat_tokenizer))
        == "<user>ab</s><assistant>cde</s><unk><unk>xy"
    )


@pytest.mark.parametrize("cells", [[TALK, "plain"], [json.loads(json.dumps(TALK)), "plain"]])
def test_column_may_mix_messages_and_text(cells: list[Any]) -> None:
    read = choose(Rows("rows.jsonl", ("text",), {"text": cells}), TASKS["text-generation"].columns, {})
    assert read["text"].to_pylist() == [text_or_messages(TALK), "plain"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TALK[:1], "There is no assistant message in a conversation of 1 messages"),
        ([{"role": "assistant", "content": " "}], "no assistant message"),
        ([{"role": "robot", "content": "a"}], "the role 'robot'"),
    ],
)
def test_conversation_without_answer_is_rejected(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        choose(Rows("rows.jsonl", ("text",), {"text": ["fine", value]}), TASKS["text-generation"].columns, {})
    assert "rows.jsonl" in caught.value.what


@pytest.mark.parametrize("value", [7, [], ["a"], [{"role": "user"}], {"role": "user", "content": "a"}])
def test_other_types_are_rejected(value: Any) -> None:
    with pytest.raises(TypeError):
        text_or_messages(value)


def test_missing_and_unusable_chat_templates_are_reported() -> None:
    row = text_or_messages(TALK)
    assert row is not None
    with pytest.raises(DataError, match="no chat template"):
        rendered(row, tokenizer(None))
    last = "{% for message in messages %}{% if loop.last %}<last>{% endif %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="changes earlier messages when others follow"):
        rendered(row, tokenizer(last))
    with pytest.raises(DataError, match="refuses a conversation: no"):
        rendered(row, tokenizer("{{ raise_exception('no') }}"))
