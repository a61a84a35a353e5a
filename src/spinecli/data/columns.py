"""The names by which columns are recognised, and the choice of a text among them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"))
INPUTS = ("input", "context")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
"""Two texts that are judged together."""
TEXTS = ("text", "sentence", "sentence1", "question", "content", "story", "document")
"""In order of preference."""
LABELS = ("label", "labels", "category", "class")
GROUPS = ("client", "speaker", "user", "device")


def recognised(columns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of `names` that is a column, in upper or lower case, as the column is written."""
    present: dict[str, str] = {}
    for column in columns:
        present.setdefault(column.lower(), column)
    return next((present[name] for name in names if name in present), None)


def first_couple(columns: Iterable[str], couples: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """The first couple of which both are columns, as the columns are written."""
    columns = tuple(columns)
    for first, second in couples:
        one, other = recognised(columns, (first,)), recognised(columns, (second,))
        if one is not None and other is not None:
            return one, other
    return None


@lru_cache(maxsize=64)
def text_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns whose words, one below the other, are the text of a row that is read as plain text.

    A text that stands alone comes before an instruction with its answer, and that before a pair of texts.
    """
    # a question beside the sentence that answers it is no text by itself, the sentence is
    halves = {name for pair in PAIRS for name in pair if first_couple(columns, (pair,))} - {"sentence"}
    alone = recognised(columns, (name for name in TEXTS if name not in halves))
    if alone is not None:
        return (alone,)
    if prompt := first_couple(columns, PROMPTS):
        given = recognised(columns, INPUTS)
        return (prompt[0], prompt[1]) if given is None else (prompt[0], given, prompt[1])
    return first_couple(columns, PAIRS) or ()
