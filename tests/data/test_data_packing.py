from __future__ import annotations

import pytest
import torch
from conversing import chat_tokenizer
from families import sample_text, tokenizer

from spinecli.data.conversations import Turn, segments
from spinecli.data.packing import packed_rows
from spinecli.data.rows import Frame
from spinecli.data.text import Text
from spinecli.errors import CalibrationTextError

BOS, END = 1, 2
FRAME = Frame((BOS,), (), ("<s>",))
DOCUMENTS = tuple(sample_text()[start : start + 40].strip() for start in range(0, 2000, 40))
TALK = (Turn("user", "bat dis kos"), Turn("assistant", "lut men"), Turn("user", "nas"), Turn("assistant", "pok ril"))


def test_documents_follow_each_other_and_end_with_the_end_token() -> None:
    made = tokenizer()
    rows = packed_rows(made, Text("x", "x", DOCUMENTS), 20, 16, frame=FRAME)
    expected: list[int] = []
    for document in DOCUMENTS:
        expected += [BOS] * (len(expected) % 15 > 0)
        expected += [*made(document, add_special_tokens=False)["input_ids"], END]
    assert (rows.tokens[:, 0] == BOS).all()
    assert rows.tokens[:, 1:].flatten().tolist() == expected[: rows.rows * 15]
    assert not rows.targets[:, 0].any()
    opened = rows.tokens[:, 1:] == BOS
    assert opened.any()
    assert not rows.targets[:, 1:][opened].any()
    assert rows.targets[:, 1:][~opened].all()


def test_a_long_document_goes_on_in_the_next_row() -> None:
    made = tokenizer()
    rows = packed_rows(made, Text("x", "x", (sample_text(),)), 3, 16, frame=FRAME)
    whole = made(sample_text(), add_special_tokens=False)["input_ids"]
    assert rows.tokens[:, 1:].flatten().tolist() == whole[:45]


def test_of_a_conversation_the_answers_are_scored() -> None:
    made = chat_tokenizer()
    rows = packed_rows(made, Text("x", "x", (), (TALK,) * 4), 3, 24, frame=FRAME)
    answers = made(["lut men</s>", "pok ril</s>"], add_special_tokens=False)["input_ids"]
    scored = rows.tokens[:, 1:].flatten()[rows.targets[:, 1:].flatten()].tolist()
    wanted = (answers[0] + answers[1]) * 4
    assert scored
    assert scored == wanted[: len(scored)]


def test_segments_give_the_rendered_conversation_back() -> None:
    made = chat_tokenizer()
    found = segments(TALK, made, "x")
    assert "".join(each.text for each in found) == made.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in TALK], tokenize=False
    )
    assert [each.text for each in found if each.answered] == ["lut men</s>", "pok ril</s>"]


def test_a_template_that_rewrites_early_turns_leaves_the_last_answer() -> None:
    """As templates do that drop what the assistant was thinking once the user has spoken again."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<assistant>...</s>{% else %}"
        "<{{ m.role }}>{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = segments(TALK, chat_tokenizer(template), "x")
    assert [each.text for each in found if each.answered] == ["pok ril</s>"]


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(CalibrationTextError, match="fewer than one row"):
        packed_rows(tokenizer(), Text("short.txt", "x", ("bat",)), 3, 16, frame=FRAME)


def test_fewer_rows_come_of_a_text_that_ends() -> None:
    assert packed_rows(tokenizer(), Text("x", "x", DOCUMENTS[:3]), 1000, 16).rows < 1000
    assert torch.equal(
        packed_rows(tokenizer(), Text("x", "x", DOCUMENTS[:3]), 1000, 16).tokens[:2],
        packed_rows(tokenizer(), Text("x", "x", DOCUMENTS[:3]), 2, 16).tokens,
    )
