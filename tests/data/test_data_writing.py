from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conversing import chat_tokenizer
from families import VARIANTS, VOCABULARY, Recipe, recipe, tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream import whole_model as loading
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.stream.whole_model import whole_model
from spinecli.data.chat_form import ChatForm, chat_form_of
from spinecli.data.writing import RowForm, draws_of, pick, written_rows

Opened = Callable[[Recipe], Checkpoint]
PLAIN = RowForm(24, (1,), tuple(range(3, VOCABULARY)), frozenset({2}))
CHAT = replace(PLAIN, chat=ChatForm((10, 11), (12, 13), (14, 15)))
LLAMA = recipe("llama", grouped=True)


def loaded(checkpoint: Checkpoint) -> PreTrainedModel:
    return whole_model(checkpoint, ComputeOptions())[0]


@torch.no_grad()
def predictions(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """What each token is drawn from, by the whole rows at once: (rows, length - 1, vocabulary)."""
    return model(rows, use_cache=False).logits[:, :-1].float()


CAUSAL = [name for name, each in VARIANTS.items() if each.task == "causal-lm"]


@pytest.mark.parametrize("name", CAUSAL)
def test_every_token_is_drawn_from_what_the_model_predicts(opened: Opened, name: str) -> None:
    """Without a cache, the whole rows at once: the same draws give the same tokens."""
    model = loaded(opened(VARIANTS[name]))
    rows = written_rows(model, replace(PLAIN, length=12), range(3), seed=5)
    draws = torch.stack([draws_of(5, number, 12) for number in range(3)])
    after = predictions(model, rows)
    for position in range(2, 12):
        drawn = pick(after[:, position - 1], draws[:, position])
        new = rows[:, position - 1] == 2
        assert torch.equal(rows[~new, position], drawn[~new])
        first = [PLAIN.words[int(draw * len(PLAIN.words))] for draw in draws[new, position].tolist()]
        assert rows[new, position].tolist() == first


def test_the_likeliest_tokens_are_those_that_transformers_generates(opened: Opened) -> None:
    model = loaded(opened(LLAMA))
    rows = written_rows(model, replace(PLAIN, ends=frozenset()), range(4), seed=0, greedy=True)
    settings = {"max_new_tokens": 22, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(rows, model.generate(rows[:, :2], attention_mask=torch.ones_like(rows[:, :2]), **settings))


def test_rows_depend_on_the_seed_and_their_number_alone(opened: Opened) -> None:
    model, state = loaded(opened(LLAMA)), torch.get_rng_state()
    rows = written_rows(model, CHAT, range(6), seed=3)
    assert torch.equal(rows, written_rows(model, CHAT, range(6), seed=3))
    assert torch.equal(rows[4:], written_rows(model, CHAT, range(4, 6), seed=3))
    assert not torch.equal(rows, written_rows(model, CHAT, range(6), seed=4))
    assert len({tuple(row) for row in rows.tolist()}) == 6
    assert torch.equal(state, torch.get_rng_state())


def test_blocks_that_stay_on_disk_write_the_same(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened(LLAMA)
    rows = written_rows(loaded(checkpoint), PLAIN, range(2), seed=0)
    monkeypatch.setattr(loading, "WHOLE_MODEL_BYTES", 0)
    assert torch.equal(rows, written_rows(loaded(checkpoint), PLAIN, range(2), seed=0))


class Saying:
    """A model that is certain of the next token: after token t it says `next_of[t]`, else 99."""

    device = "cpu"

    def __init__(self, next_of: dict[int, int]) -> None:
        self.next_of = next_of

    def __call__(self, input_ids: Tensor, past_key_values: object, use_cache: bool) -> object:
        assert input_ids.shape[1] == 1
        logits = torch.zeros(len(input_ids), 1, VOCABULARY)
        for row, token in enumerate(input_ids[:, 0].tolist()):
            logits[row, 0, self.next_of.get(token, 99)] = 1e4
        return type("Answer", (), {"logits": logits, "past_key_values": None})()


def said(next_of: dict[int, int], form: RowForm, number: int) -> list[int]:
    return written_rows(Saying(next_of), form, [number], seed=0)[0].tolist()  # type: ignore[arg-type]


def test_a_document_that_ends_is_followed_by_another(opened: Opened) -> None:
    row = said({99: 2}, replace(PLAIN, words=(50,), length=9), 0)
    assert row == [1, 50, 99, 2, 50, 99, 2, 50, 99]


def test_a_conversation_has_what_the_template_writes_around_words() -> None:
    """The template's own end takes the place of whatever ended a turn."""
    form = replace(CHAT, length=18)
    assert said({11: 60, 60: 2, 13: 70, 70: 71, 71: 2, 15: 61, 61: 12}, form, 3) == [
        *(1, 10, 11, 60, 12, 13, 70, 71),
        *(14, 15, 61, 12, 13, 70, 71, 14, 15, 61),
    ]
    assert 10 not in said({99: 2}, form, 0)


def test_a_user_who_does_not_end_is_cut_short() -> None:
    row = said({}, replace(CHAT, length=18), 3)
    assert row == [1, 10, 11, *[99] * 6, 12, 13, *[99] * 7]


def test_a_user_says_something() -> None:
    row = said({11: 2}, replace(CHAT, length=8), 3)
    assert row[3] not in (2, 12)


def test_after_an_answer_without_another_round_comes_a_document() -> None:
    form = replace(CHAT, words=(50,), chat=ChatForm((10, 11), (12, 13), ()), length=12)
    assert said({11: 60, 60: 2, 13: 70, 70: 2}, form, 3) == [1, 10, 11, 60, 12, 13, 70, 2, 50, 99, 99, 99]


def test_tokens_come_as_often_as_the_model_predicts() -> None:
    chances = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    draws = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    found = pick(chances.log().expand(len(draws), -1), draws).bincount(minlength=5) / len(draws)
    torch.testing.assert_close(found, chances, atol=2e-4, rtol=0)


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(200, -1)
    draws = torch.linspace(0, 1, 201, dtype=torch.float64)[:-1]
    assert set(pick(logits, draws).tolist()) == {1, 2}


def test_a_template_is_split_at_the_words() -> None:
    made = chat_tokenizer()
    form = chat_form_of(made, "<s>")
    assert isinstance(form, ChatForm)
    assert [made.decode(part) for part in (form.before, form.after, form.between)] == [
        "<user>",
        "</s><assistant>",
        "</s><user>",
    ]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('only French') }}", "fails"),
        ("{{ messages[5].content }}", "fails|words as they are"),
        ("{% for m in messages %}[{{ m.content | upper }}]{% endfor %}", "words as they are"),
        ("{% for m in messages %}[{{ m.content }}{{ m.content }}]{% endfor %}", "words as they are"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "begin and end"),
        ("", "no chat template"),
    ],
)
def test_a_template_that_cannot_be_split_says_why(template: str, why: str) -> None:
    found = chat_form_of(chat_tokenizer(template))
    assert isinstance(found, str)
    assert re.search(why, found)


def test_a_template_that_allows_one_round_gives_one() -> None:
    one = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}<u>{{ messages[0].content }}<a>"
    form = chat_form_of(chat_tokenizer(one))
    assert isinstance(form, ChatForm)
    assert (form.between, tokenizer().decode(form.after)) == ((), "<a>")


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    form = chat_form_of(chat_tokenizer("{{ strftime_now('%d %b %Y') }}<u>{{ messages[0].content }}<a>"))
    assert isinstance(form, ChatForm)
    assert "26 Jul 2024" in tokenizer().decode(form.before)
