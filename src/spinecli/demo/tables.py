"""What the built-in language knows about its world.

The tables say which words go together: what a baker tends to bake, where a lamp tends to
be put down in a mill.  They are drawn once from a constant seed, so there is no rule
behind them to discover: a model can only learn them by heart.  Only ``Random.random`` is
used, whose sequence Python guarantees across versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import chain
from random import Random
from typing import NamedTuple

from spinecli.demo import vocabulary as v

WORLD_SEED = 20240229

Phrase = tuple[str, ...]
Ranked = list[tuple[str, float]]
Options = tuple[tuple[Phrase, float], ...]
"""Phrases with their weights, which need not sum to one."""


class World(NamedTuple):
    """The tables; every value is a set of weighted phrases."""

    weather: dict[str, Options]
    """place -> weather and time of day, as ``("foggy", "morning")``"""
    local_profession: dict[str, Options]
    """place -> profession"""
    home: dict[str, Options]
    """profession -> place"""
    belonging: dict[str, Options]
    """profession -> article, adjective and object"""
    work: dict[str, Options]
    """profession -> verb"""
    goods: dict[tuple[str, str], Options]
    """profession, verb -> goods, with or without an adjective"""
    manner: dict[str, Options]
    """verb -> adverb, or the full stop, or "and" before a second verb"""
    spot: dict[tuple[str, str], Options]
    """object, topic -> preposition, "the" and piece of furniture"""
    creature: dict[str, Options]
    """place -> article, adjective or not, and creature"""
    doing: dict[str, Options]
    """creature -> what it is doing"""
    next_place: dict[str, Options]
    """place -> neighbouring place"""
    mood: dict[tuple[str, str], Options]
    """weather, profession -> mood"""


TOPIC_OF = {
    word: topic for rows in (v.PLACES, v.PROFESSIONS) for topic, row in zip(v.TOPICS, rows, strict=True) for word in row
}
ALL_PLACES = tuple(chain.from_iterable(v.PLACES))
ALL_PROFESSIONS = tuple(chain.from_iterable(v.PROFESSIONS))


def article(word: str) -> str:
    """The indefinite article that goes before ``word``."""
    return "an" if word[0] in "aeiou" else "a"


def shuffled(rng: Random, items: Sequence[str]) -> list[str]:
    """A random order of ``items`` that depends on ``rng.random`` alone."""
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))]


def ranked(rng: Random, items: Sequence[str], count: int, steepness: float) -> Ranked:
    """``count`` of the items, the r-th of them (from 1) with weight ``r ** -steepness``."""
    return [(item, (rank + 1) ** -steepness) for rank, item in enumerate(shuffled(rng, items)[:count])]


def _words(pairs: Ranked) -> Options:
    return tuple(((word,), weight) for word, weight in pairs)


def _described(nouns: Ranked, adjectives_of: dict[str, Ranked]) -> Options:
    """Each noun alone or, just as often, after one of its adjectives."""
    plain = _words(nouns)
    return plain + tuple(
        ((adjective, noun), weight * share / math.fsum(s for _, s in adjectives_of[noun]))
        for noun, weight in nouns
        for adjective, share in adjectives_of[noun]
    )


def _creatures(creatures: Ranked, adjectives_of: dict[str, Ranked]) -> Options:
    """The same with the article before it."""
    return tuple(((article(phrase[0]), *phrase), weight) for phrase, weight in _described(creatures, adjectives_of))


def _product(first: Ranked, second: dict[str, Ranked]) -> Options:
    """Two-word phrases: a first word, then one of the second words listed for it."""
    return tuple(((a, b), weight_a * weight_b) for a, weight_a in first for b, weight_b in second[a])


@cache
def world() -> World:
    """The tables of the language, drawn on first use (about 20 ms)."""
    rng = Random(WORLD_SEED)
    verbs_of = {job: ranked(rng, v.VERBS, 12, 0.6) for job in ALL_PROFESSIONS}
    adjectives_of = {word: ranked(rng, v.ADJECTIVES, 6, 0.8) for word in v.OBJECTS + v.GOODS + v.CREATURES}
    times_of = {weather: ranked(rng, v.TIMES, 4, 1.0) for weather in v.WEATHERS}
    topic_row = dict(zip(v.TOPICS, range(len(v.TOPICS)), strict=True))

    def places_like(word: str) -> tuple[str, ...]:
        return v.PLACES[topic_row[TOPIC_OF[word]]]

    belonging: dict[str, Options] = {}
    for job in ALL_PROFESSIONS:
        belonging[job] = tuple(
            ((article(adjective), adjective, item), weight * share)
            for item, weight in ranked(rng, v.OBJECTS, 12, 0.6)
            for adjective, share in adjectives_of[item]
        )
    spots = {" ".join(spot): spot for spot in v.SPOTS}
    return World(
        weather={p: _product(ranked(rng, v.WEATHERS, 6, 1.0), times_of) for p in ALL_PLACES},
        local_profession={
            p: _words(
                ranked(rng, v.PROFESSIONS[topic_row[TOPIC_OF[p]]], 6, 0.7)
                + [(job, 0.25 * weight) for job, weight in ranked(rng, _elsewhere(p), 4, 1.0)]
            )
            for p in ALL_PLACES
        },
        home={job: _words(ranked(rng, places_like(job), 3, 2.0)) for job in ALL_PROFESSIONS},
        belonging=belonging,
        work={job: _words(verbs) for job, verbs in verbs_of.items()},
        goods={
            (job, verb): _described(ranked(rng, v.GOODS, 10, 0.8), adjectives_of)
            for job, verbs in verbs_of.items()
            for verb, _ in verbs
        },
        manner={verb: (((".",), 1.0), (("and",), 0.9), *_words(ranked(rng, v.ADVERBS, 8, 0.8))) for verb in v.VERBS},
        spot={
            (item, topic): tuple((spots[name], weight) for name, weight in ranked(rng, list(spots), 5, 1.2))
            for item in v.OBJECTS
            for topic in v.TOPICS
        },
        creature={p: _creatures(ranked(rng, v.CREATURES, 12, 0.6), adjectives_of) for p in ALL_PLACES},
        doing={c: _words(ranked(rng, v.DOINGS, 8, 0.8)) for c in v.CREATURES},
        next_place={p: _words(ranked(rng, [q for q in places_like(p) if q != p], 4, 1.0)) for p in ALL_PLACES},
        mood={
            (weather, job): _words(ranked(rng, v.MOODS, 5, 1.0)) for weather in v.WEATHERS for job in ALL_PROFESSIONS
        },
    )


def _elsewhere(place: str) -> list[str]:
    """The professions of every other topic than the place's."""
    return [job for job in ALL_PROFESSIONS if TOPIC_OF[job] != TOPIC_OF[place]]
