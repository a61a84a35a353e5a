from __future__ import annotations

import json
from typing import Any

import pytest
from conversing import chat_tokenizer

from spinecli.data.conversations import Turn, is_conversation, read_conversation, render
from spinecli.errors import DataError


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}],
    ],
)
def test_usual_layouts_are_one_conversation(messages: list[Any]) -> None:
    conversation = (Turn("user", "a"), Turn("assistant", "b"))
    assert is_conversation(messages)
    assert read_conversation(messages, "x line 1", "messages") == conversation
    # the field of a .csv, or a column of strings
    assert read_conversation(json.dumps(messages), "x line 1", "messages") == conversation


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [USER, USER],
        [ASSISTANT],
        [{**USER, "label": 0}, {**ASSISTANT, "label": 1}],
        [{**USER, "conversation": 1}, {**ASSISTANT, "conversation": 2}],
        [{"role": "teacher", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user"}, {"role": "assistant"}],
        [{"content": "a"}, {"content": "b"}],
        ["a", "b"],
        {"role": "user", "content": "a"},
    ],
)
def test_rows_with_the_columns_of_a_message_are_no_conversation(rows: object) -> None:
    assert not is_conversation(rows)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[{'role': 'user'}]", r"not a JSON list of messages \(.*write the list as JSON, or save the rows as .jsonl"),
        ("hello", "not a JSON list of messages"),
        ('{"role": "user", "content": "a"}', "not a JSON list of messages"),
        ("[" * 100_000, "not a JSON list of messages"),
        ("[]", "no list of messages"),
        ('["a"]', "message 1 without role or text"),
        (None, "no list of messages"),
        ([], "no list of messages"),
        (["a"], "message 1 without role or text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "message 2 without role or text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 1 without role or text"),
    ],
)
def test_what_is_no_conversation_is_told(value: object, words: str) -> None:
    with pytest.raises(DataError, match=f"^x line 1 has in column 'messages' .*{words}"):
        read_conversation(value, "x line 1", "messages")


def test_a_template_that_refuses_gives_its_own_reason() -> None:
    made = chat_tokenizer("{{ raise_exception('Roles must alternate user/assistant') }}")
    with pytest.raises(DataError, match=r"refuses a conversation of x \(Roles must alternate user/assistant\)"):
        render((Turn("user", "a"),), made, "x")
