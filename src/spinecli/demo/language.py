"""The built-in language: short stories whose probability is known exactly.

The stories are made of English words, and the generator is an open book: every random
choice is visible in the text the moment it is made.  So the surprisal of every word, and
with it the lowest perplexity that any model can be expected to reach, is known and not
estimated.

>>> story = generate(documents=1, seed=0)[0]
>>> len(story.words) == len(story.surprisals)
True

One caveat: the surprisals are those of a reader who has seen the story from its first
word.  A model that is shown a window cut out of the middle of a text knows less, so its
best possible perplexity lies above :func:`floor_perplexity`.  The floor is a true lower
bound in expectation; on one finite text a model may by luck do better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from spinecli.demo import vocabulary as v
from spinecli.demo.story import tell
from spinecli.demo.story_sampler import EndOfTextError, NotInLanguageError, Reader, Writer
from spinecli.demo.tables import TOPIC_OF

_PUNCTUATION = frozenset(".,")


@dataclass(frozen=True)
class Document:
    """One story with the surprisal of each of its words."""

    words: tuple[str, ...]
    """The last one is ``vocabulary.END``."""
    surprisals: tuple[float, ...]
    """In nats, one for each word."""

    @property
    def text(self) -> str:
        """The story on one line, without the word that ends it."""
        return join(self.words[:-1])

    @property
    def topic(self) -> str:
        """Which of ``vocabulary.TOPICS`` the place of the story belongs to."""
        return TOPIC_OF[self.words[2]]


def join(words: Sequence[str]) -> str:
    """Words as running text, with no space before a full stop or a comma."""
    return "".join(word if i == 0 or word in _PUNCTUATION else " " + word for i, word in enumerate(words))


def split(text: str) -> tuple[str, ...]:
    """The words of one line of running text; the opposite of :func:`join`."""
    return tuple(text.replace(".", " .").replace(",", " ,").split())


def write_story(rng: Random) -> Document:
    """The next story that ``rng`` leads to."""
    pen = Writer(rng)
    tell(pen)
    return Document(tuple(pen.words), tuple(pen.surprisals))


def generate(documents: int, seed: int) -> list[Document]:
    """``documents`` stories; the same ones for the same seed on every Python version."""
    rng = Random(seed)
    return [write_story(rng) for _ in range(documents)]


def surprisals(words: Sequence[str]) -> tuple[float, ...]:
    """Surprisal in nats of every word of a complete story, read off its text alone.

    Raises :class:`NotInLanguageError` if the words are not one complete story.
    """
    pen = Reader(words)
    try:
        tell(pen)
    except EndOfTextError as error:
        raise NotInLanguageError(str(error)) from None
    if len(pen.words) != len(words):
        raise NotInLanguageError(f"the story ends after {len(pen.words)} of {len(words)} words")
    return tuple(pen.surprisals)


def next_word_probabilities(words: Sequence[str]) -> dict[str, float]:
    """Exact probability of every word that can follow the beginning of a story."""
    try:
        tell(Reader(words))
    except EndOfTextError as error:
        return error.probabilities
    raise NotInLanguageError("the story is already complete")


def floor_perplexity(documents: Iterable[Document]) -> float:
    """Perplexity per word, end words included, of the generator itself on these stories."""
    total, count = 0.0, 0
    for document in documents:
        total += math.fsum(document.surprisals)
        count += len(document.surprisals)
    return math.exp(total / count)


def vocabulary() -> tuple[str, ...]:
    """Every word of the language, the end word included, in a fixed order."""
    lists: list[Iterable[str]] = [(v.END,), v.FUNCTION_WORDS, *v.PLACES, *v.PROFESSIONS, v.WOMEN, v.MEN]
    lists += [v.OBJECTS, v.ADJECTIVES, v.VERBS, v.GOODS, v.ADVERBS, v.CREATURES, v.DOINGS, *v.SPOTS]
    lists += [v.WEATHERS, v.TIMES, v.MOODS]
    return tuple(dict.fromkeys(word for words in lists for word in words))


@dataclass(frozen=True)
class Labelled:
    """One example of a classification task."""

    text: str
    label: int
    """Index into ``vocabulary.TOPICS``."""


def labelled(examples: int, seed: int) -> list[Labelled]:
    """Stories to be sorted by topic; the opening sentence, which names the place, is left out."""
    found = []
    for document in generate(examples, seed):
        start = document.words.index(".") + 1
        text = join(document.words[start:-1])
        found.append(Labelled(text, v.TOPICS.index(document.topic)))
    return found
