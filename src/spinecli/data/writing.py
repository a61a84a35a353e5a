"""Text that a model itself writes: tokens drawn one after the other from what it predicts.

All rows of a batch grow by a token at a time, so nothing is padded. What a row gets next is drawn from the model's
prediction, or stands in its form: its opening, the first word of a document, what the chat template writes between
words. A row's draws depend on the seed and its number alone, so rows can be written in any batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spinecli.artifacts.seeding import torch_generator
from spinecli.data.chat_form import ChatForm

RULE = 1
"""Version of the way in which rows are written; it counts among what decides them."""
_PURPOSE = "calibration text"
_CHAT_EVERY = 4


@dataclass(frozen=True)
class RowForm:
    """What rows have besides the words that the model predicts."""

    length: int
    opening: tuple[int, ...]
    words: tuple[int, ...]
    """Tokens that a document may begin with, rising."""
    ends: frozenset[int]
    """Tokens that end a document or a turn."""
    chat: ChatForm | None = None
    """Of every fourth row, which then is a conversation; None if there are only documents."""


class _Speaker(Enum):
    nobody = "a document"
    user = "the user"
    assistant = "the assistant"


class _Row:
    """One row as it grows: which token comes next, given the one that was drawn."""

    def __init__(self, form: RowForm, number: int) -> None:
        self._form = form
        self._chat = form.chat if number % _CHAT_EVERY == _CHAT_EVERY - 1 else None
        self._speaker = _Speaker.user if self._chat else _Speaker.nobody
        self._given = deque((*form.opening, *(self._chat.before if self._chat else ())))
        self._ends = form.ends | ({self._chat.after[0]} if self._chat else set())
        self._said = 0
        """Tokens of the document or turn so far."""

    @property
    def must_begin(self) -> bool:
        """Whether the next token must not end what has not begun: a user's turn of no words asks nothing."""
        return self._speaker is _Speaker.user and self._said == 0 and not self._given

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end what is being said."""
        return frozenset(self._ends)

    def next(self, drawn: int, draw: float) -> int:
        """The next token.

        Args:
            drawn: from the model's prediction.
            draw: the number in [0, 1) that it was drawn with.
        """
        if self._given:
            return self._given.popleft()
        if self._speaker is _Speaker.nobody and self._said == 0:
            drawn = self._form.words[int(draw * len(self._form.words))]
        elif drawn in self._ends or self._has_asked_enough:
            return self._turn(drawn)
        self._said += 1
        return drawn

    @property
    def _has_asked_enough(self) -> bool:
        return self._speaker is _Speaker.user and self._said >= self._form.length // 3

    def _turn(self, drawn: int) -> int:
        """The first token behind what was said; the template's own end takes the place of the one that was drawn."""
        self._said = 0
        if self._chat and self._speaker is _Speaker.user:
            self._speaker = _Speaker.assistant
            self._given.extend(self._chat.after)
        elif self._chat and self._chat.between and self._speaker is _Speaker.assistant:
            self._speaker = _Speaker.user
            self._given.extend(self._chat.between)
        else:
            self._speaker = _Speaker.nobody
            return drawn
        return self._given.popleft()


@torch.no_grad()
def written_rows(
    model: PreTrainedModel,
    form: RowForm,
    numbers: Sequence[int],
    seed: int,
    heard: Callable[[int], None] = lambda position: None,
    *,
    greedy: bool = False,
) -> Tensor:
    """The rows with these numbers, all at once: (rows, length) int64.

    Args:
        heard: called with the number of finished positions.
        greedy: take the likeliest token each time.
    """
    rows = [_Row(form, number) for number in numbers]
    draws = torch.stack([draws_of(seed, number, form.length) for number in numbers])
    tokens = torch.zeros(len(rows), form.length, dtype=torch.int64)
    cache, drawn = None, [0] * len(rows)
    for position in range(form.length):
        if position:
            answer = model(
                input_ids=tokens[:, position - 1 : position].to(model.device), past_key_values=cache, use_cache=True
            )
            cache = answer.past_key_values
            likely = answer.logits[:, -1].float().cpu()
            for index, row in enumerate(rows):
                if row.must_begin:
                    likely[index, list(row.ends)] = -torch.inf
            drawn = (likely.argmax(dim=-1) if greedy else pick(likely, draws[:, position])).tolist()
        said = zip(rows, drawn, draws[:, position].tolist(), strict=True)
        tokens[:, position] = torch.tensor([row.next(token, draw) for row, token, draw in said])
        heard(position + 1)
    return tokens


def draws_of(seed: int, number: int, length: int) -> Tensor:
    """The random numbers in [0, 1) behind the tokens of row `number`: (length,) float64."""
    return torch.rand(length, generator=torch_generator(seed, _PURPOSE, number), dtype=torch.float64)


def pick(logits: Tensor, draws: Tensor) -> Tensor:
    """Tokens by their probability: (rows,) int64.

    Nothing is left out: what a model holds for unlikely is part of what it can, and a cut that has never seen it loses
    it.

    Args:
        logits: (rows, vocabulary) float32.
        draws: (rows,) in [0, 1).
    """
    reached = logits.softmax(dim=-1).double().cumsum(dim=-1)
    places = torch.searchsorted(reached, (draws * reached[:, -1])[:, None], right=True)
    return places[:, 0].clamp_max(logits.shape[1] - 1)
