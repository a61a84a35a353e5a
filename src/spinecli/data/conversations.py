"""Conversations as chat data sets hold them, rendered by the chat template of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from spinecli.errors import DataError, TokenizerError, reason_of

# what ShareGPT calls them
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


_SPEAKERS = {"system", "developer", "user", "assistant", "tool", "function"}
_PARTS = {"role", "content", "from", "value", "name", "weight", "tool_calls", "tool_call_id"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


class ChatTokenizer(Protocol):
    """What is asked of a tokenizer here, which any of transformers' has."""

    chat_template: Any
    all_special_tokens: Any

    def apply_chat_template(self, conversation: Any, /, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """The conversation as one string."""


def read_conversation(value: object, place: str, column: str) -> Conversation:
    """A list of messages, each with `role` and `content`, or with `from` and `value` as ShareGPT has them.

    Args:
        value: the list, or a string that holds it as JSON, which is how a field of a .csv can.
        place: of the row, as an error names it.

    Raises: DataError if the value is no such list.
    """
    where = f"{place} has in column {column!r}"
    if isinstance(value, str):
        value = _parsed(value, where)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where} no list of messages, but {value!r:.40}; fix or remove the row.")
    return tuple(_turn(message, number, where) for number, message in enumerate(value, start=1))


def _parsed(value: str, where: str) -> object:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise DataError(
            f"{where} a text that is not a JSON list of messages ({value!r:.40}); write the list as JSON, or save the "
            "rows as .jsonl."
        )
    return found


def is_conversation(value: object) -> bool:
    """Whether a list is the messages of one conversation, to be told from the rows of a table with such columns.

    A message has nothing beside what messages have, and the assistant and somebody else speak.
    """
    if not isinstance(value, list) or not all(isinstance(one, Mapping) and _PARTS.issuperset(one) for one in value):
        return False
    roles = [one.get("role") if "content" in one else one.get("from") if "value" in one else None for one in value]
    speakers = {_ROLES.get(role, role) if isinstance(role, str) else None for role in roles}
    return speakers <= _SPEAKERS and "assistant" in speakers and len(speakers) > 1


def _turn(message: object, number: int, where: str) -> Turn:
    if isinstance(message, Mapping):
        role = message.get("role") or message.get("from")
        content = message.get("content") if message.get("role") else message.get("value")
        if isinstance(content, list) and all(_is_text(part) for part in content):
            content = "".join(part["text"] for part in content)
        if isinstance(role, str) and isinstance(content, str):
            return Turn(_ROLES.get(role, role), content)
    raise DataError(
        f"{where} a message {number} without role or text ({message!r:.40}); a message has role and content, or from "
        "and value."
    )


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def render(
    conversation: Conversation, tokenizer: ChatTokenizer, reference: str, *, add_generation_prompt: bool = False
) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        reference: the data, as an error names them.

    Raises: TokenizerError if there is no template, DataError if it refuses the conversation.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise TokenizerError(
            f"{reference} holds conversations and the model's tokenizer has no chat template; name data with a text "
            "column, or add the model's chat_template.jinja."
        )
    turns = [asdict(turn) for turn in conversation]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = reason_of(error)
        raise DataError(
            f"The model's chat template refuses a conversation of {reference} ({reason}); fix or remove it."
        ) from error
    return str(rendered)


def joined(conversations: Sequence[Conversation], tokenizer: ChatTokenizer, reference: str, opening: str = "") -> str:
    """Conversations one behind the other, as one text.

    A newline is put only behind one that its template does not end by a newline or a special token.

    Args:
        opening: what every row of tokens begins with by itself, and no conversation twice.

    Raises: as `render`.
    """
    ends = ("\n", *(str(token) for token in tokenizer.all_special_tokens))
    pieces = []
    for conversation in conversations:
        piece = render(conversation, tokenizer, reference)
        piece = piece.removeprefix(opening)
        pieces.append(piece if piece.endswith(ends) else f"{piece}\n")
    return "".join(pieces)


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation."""

    text: str
    answered: bool
    """Whether the assistant says it, what ends its turn included."""


def segments(conversation: Conversation, tokenizer: ChatTokenizer, reference: str) -> list[Segment]:
    """A rendered conversation, cut where the assistant begins and ends to speak.

    A template that writes early turns otherwise once later ones follow leaves only the last answer to be told apart.

    Raises: as `render`.
    """
    whole = render(conversation, tokenizer, reference)
    found: list[Segment] = []
    done = ""
    for index, turn in enumerate(conversation):
        if turn.role != "assistant" or index == 0:
            continue
        before = render(conversation[:index], tokenizer, reference, add_generation_prompt=True)
        through = render(conversation[: index + 1], tokenizer, reference)
        if not whole.startswith(through):
            continue
        if not (through.startswith(before) and before.startswith(done)):
            place = through.rfind(turn.content, len(done))
            if place < 0:
                continue
            before = through[:place]
        found += [Segment(before[len(done) :], answered=False), Segment(through[len(before) :], answered=True)]
        done = through
    found.append(Segment(whole[len(done) :], answered=False))
    return [each for each in found if each.text]
