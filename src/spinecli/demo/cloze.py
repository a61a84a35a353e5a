"""A multiple-choice task in the built-in language: ``python -m spinecli.demo.cloze --out FILE``.

An item is the beginning of a story and four words that could come next.  They are words of
one kind (four names, four pieces of furniture, ...), and the exact probabilities of the
language say which one is right: it is at least ten times as likely as any other.  Some kinds
ask what the story has said before, some ask what the language knows about its world.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from spinecli.demo import vocabulary as v
from spinecli.demo.language import Document, join, next_word_probabilities, write_story
from spinecli.demo.tables import ALL_PLACES, ALL_PROFESSIONS, shuffled

SEED = 700_001
CHOICES = 4
SAID, KNOWN = 0.5, 0.15
"""Least probability of the right word where the story has said it, and where only the tables know it."""
LEAST_RATIO = 10.0
EARLIEST = 30
"""Words that an item shows at least, so that both people of the story have been introduced."""

_KINDS: dict[str, tuple[float, tuple[str, ...]]] = {
    "name": (SAID, v.WOMEN + v.MEN),
    "profession": (SAID, ALL_PROFESSIONS),
    "place": (SAID, ALL_PLACES),
    "object": (SAID, v.OBJECTS),
    "adjective": (SAID, v.ADJECTIVES),
    "furniture": (SAID, tuple(noun for _, _, noun in v.SPOTS)),
    "goods": (KNOWN, v.GOODS),
    "doing": (KNOWN, v.DOINGS),
    "mood": (KNOWN, v.MOODS),
}
_KIND_OF = {word: kind for kind, (_, words) in _KINDS.items() for word in words}


@dataclass(frozen=True)
class ClozeItem:
    """One question."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """Index into ``choices``."""
    kind: str
    """What sort of word is asked for."""


def items(count: int, seed: int = SEED) -> list[ClozeItem]:
    """The first ``count`` items; each kind of word comes up equally often, each story once."""
    rng = Random(seed)
    found: list[ClozeItem] = []
    while len(found) < count:
        kind = list(_KINDS)[len(found) % len(_KINDS)]
        found += list(_items_of(write_story(rng), kind, rng))[:1]
    return found


def _items_of(story: Document, kind: str, rng: Random) -> Iterator[ClozeItem]:
    """The possible items of one kind in one story, in random order of their position."""
    least, words = _KINDS[kind]
    positions = [str(i) for i in range(EARLIEST, len(story.words)) if _KIND_OF.get(story.words[i]) == kind]
    for position in map(int, shuffled(rng, positions)):
        context, right = story.words[:position], story.words[position]
        probabilities = next_word_probabilities(context)
        if probabilities[right] < least:
            continue
        limit = probabilities[right] / LEAST_RATIO
        wrong = [word for word in words if word != right and probabilities.get(word, 0.0) <= limit]
        chosen = _tempting_first(wrong, context, rng)[: CHOICES - 1]
        choices = tuple(shuffled(rng, [right, *chosen]))
        yield ClozeItem(join(context), choices, choices.index(right), kind)


def _tempting_first(words: Sequence[str], context: Sequence[str], rng: Random) -> list[str]:
    """Random order, but words that the story has already used come before the others."""
    return sorted(shuffled(rng, words), key=lambda word: word not in context)


def main() -> None:
    """Read the command line and write the items, one JSON object on each line."""
    parser = argparse.ArgumentParser(prog="python -m spinecli.demo.cloze", description="Write the built-in task.")
    parser.add_argument("--out", type=Path, required=True, help="jsonl file to write")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    lines = [json.dumps(asdict(item)) + "\n" for item in items(arguments.items, arguments.seed)]
    arguments.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
