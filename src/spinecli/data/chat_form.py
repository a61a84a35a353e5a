"""What a chat template writes around the words of user and assistant, for a model that is to write both.

The template is asked to render probes with markers in place of the words, and what it wrote is split at the markers:

    before user after assistant between user after assistant …

So the model begins behind `before` as if a user had spoken, as in Magpie (Xu et al. 2024, arXiv 2406.08464).
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from spinecli.errors import reason_of

# Words, because a template may strip spaces around them, and unlike anything that a template writes by itself.
_USER, _ASSISTANT, _AGAIN = "QzUserSpeaksHere", "QzAssistantAnswersHere", "QzUserSpeaksAgain"
# In front of a template that writes today's date, so that the same command gives the same rows on any day.
_SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True)
class ChatForm:
    """The tokens that a chat template puts around words."""

    before: tuple[int, ...]
    """In front of the user's first words, without what every row begins with."""
    after: tuple[int, ...]
    """From the end of the user's words to the assistant's first."""
    between: tuple[int, ...]
    """From the end of the assistant's words to the user's next; empty if the template does not say."""

    @property
    def size(self) -> int:
        """Tokens of a conversation that the model does not write."""
        return len(self.before) + len(self.after)


def chat_form_of(tokenizer: PreTrainedTokenizerBase, opening: str = "") -> ChatForm | str:
    """The form of a tokenizer's chat template, or why it has none.

    Args:
        opening: what every row begins with by itself, so that the form does not.
    """
    if not tokenizer.chat_template:
        return "the tokenizer has no chat template"
    try:
        first = _rendered(tokenizer, _USER)
    # a template is somebody else's program, and may fail in any way
    except Exception as error:
        return f"the chat template fails ({reason_of(error):.120})"
    if first.count(_USER) != 1:
        return "the chat template does not hold a user's words as they are"
    before, after = first.removeprefix(opening).split(_USER)
    found = ChatForm(
        before=tuple(tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]),
        after=_behind(tokenizer, _USER, after),
        between=_between(tokenizer),
    )
    if not (found.before and found.after):
        return "the chat template does not say where a user's words begin and end"
    return found


def _between(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    try:
        whole = _rendered(tokenizer, _USER, _ASSISTANT, _AGAIN)
    except Exception:  # it may allow one round only, which is enough
        return ()
    if any(whole.count(marker) != 1 for marker in (_ASSISTANT, _AGAIN)):
        return ()
    return _behind(tokenizer, _ASSISTANT, whole.partition(_ASSISTANT)[2].partition(_AGAIN)[0])


def _rendered(tokenizer: PreTrainedTokenizerBase, *words: str) -> str:
    """User and assistant in turns, up to where the assistant is to answer."""
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": each} for number, each in enumerate(words)]
    template = _SAME_DAY + tokenizer.get_chat_template()
    return str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True))


def _behind(tokenizer: PreTrainedTokenizerBase, marker: str, text: str) -> tuple[int, ...]:
    """The tokens of `text` behind a word, where some tokenizers write a space differently than at the beginning."""
    word, whole, alone = (
        tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in (marker, marker + text, text)
    )
    return tuple(whole[len(word) :] if whole[: len(word)] == word else alone)
