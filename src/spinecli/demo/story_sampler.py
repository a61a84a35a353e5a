"""The one way in which the built-in language makes a random choice.

A story is written by calling a :class:`StorySampler`.  ``choose`` takes weighted phrases and puts
one of them on the page word by word, with the exact probability of every word given the
words before it.  The story learns of the choice only through the words that were written,
so nothing about it is hidden and the probability of a text is known exactly.  The same
story program can therefore be driven by a random generator (:class:`Writer`) or by a text
that already exists (:class:`Reader`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random

from spinecli.demo.tables import Phrase

Weighted = Sequence[tuple[Phrase, float]]


class EndOfTextError(Exception):
    """A :class:`Reader` ran out of words; ``probabilities`` are those of the next word."""

    def __init__(self, probabilities: dict[str, float]) -> None:
        super().__init__("the text ends before its story does")
        self.probabilities = probabilities


class NotInLanguageError(ValueError):
    """A text has a word that the language cannot have at that place."""


class StorySampler(ABC):
    """Puts words on a page with their surprisal; a subclass says which word comes next."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.surprisals: list[float] = []
        """In nats, one for each word."""

    @abstractmethod
    def next_word(self, weights: dict[str, float], total: float) -> str:
        """Pick one of the words; ``total`` is the sum of their weights."""

    def write(self, *words: str) -> None:
        """Put down words that could not have been different."""
        for word in words:
            self._put(word, {word: 1.0}, 1.0)

    def choose(self, options: Weighted) -> Phrase:
        """Put down one of the phrases, of which none may be the beginning of another.

        A phrase of weight zero is never written.
        """
        live, depth = options, 0
        while True:
            weights: dict[str, float] = {}
            for phrase, weight in live:
                weights[phrase[depth]] = weights.get(phrase[depth], 0.0) + weight
            word = self._put_one_of(weights)
            if len(weights) > 1:
                live = [option for option in live if option[0][depth] == word]
            depth += 1
            # Phrases are prefix-free, so the first one that ends here is the only one left.
            if len(live[0][0]) == depth:
                return live[0][0]

    def _put_one_of(self, weights: dict[str, float]) -> str:
        if len(weights) == 1:
            (word,) = weights
            self._put(word, {word: 1.0}, 1.0)
            return word
        total = math.fsum(weights.values())
        word = self.next_word(weights, total)
        self.words.append(word)
        self.surprisals.append(math.log(total / weights[word]))
        return word

    def _put(self, word: str, weights: dict[str, float], total: float) -> None:
        self.next_word(weights, total)
        self.words.append(word)
        self.surprisals.append(0.0)


class Writer(StorySampler):
    """Draws every word at random."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self._random = rng.random

    def next_word(self, weights: dict[str, float], total: float) -> str:
        """Draw a word with a chance in proportion to its weight."""
        if len(weights) > 1:
            mark = self._random() * total
            for word, weight in weights.items():
                mark -= weight
                if mark < 0.0:
                    return word
        # Rounding can leave the mark a hair above zero after the last word.
        return next(reversed(weights))


class Reader(StorySampler):
    """Follows a text that is already there."""

    def __init__(self, text: Sequence[str]) -> None:
        super().__init__()
        self._text = text

    def next_word(self, weights: dict[str, float], total: float) -> str:
        """The word that the text has here."""
        at = len(self.words)
        if at == len(self._text):
            raise EndOfTextError({word: weight / total for word, weight in weights.items() if weight})
        word = self._text[at]
        if not weights.get(word):
            raise NotInLanguageError(f"word {at + 1} of the text is {word!r}, expected one of {sorted(weights)[:8]}")
        return word
