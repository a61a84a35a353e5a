from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinecli.demo import vocabulary as v
from spinecli.demo.language import (
    NotInLanguageError,
    floor_perplexity,
    generate,
    join,
    labelled,
    next_word_probabilities,
    split,
    surprisals,
    vocabulary,
)
from spinecli.demo.story import tell
from spinecli.demo.story_sampler import Writer

STORIES = generate(documents=400, seed=11)


class CountingWriter(Writer):
    """Adds up how often each word should come and how often it does."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.expected: Counter[str] = Counter()
        self.variance: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def next_word(self, weights: dict[str, float], total: float) -> str:
        for word, weight in weights.items():
            self.expected[word] += weight / total
            self.variance[word] += weight / total * (1.0 - weight / total)
        drawn = super().next_word(weights, total)
        self.seen[drawn] += 1
        return drawn


@settings(max_examples=30, deadline=None)
@given(st.integers(min_value=0, max_value=2**40))
def test_surprisals_can_be_read_off_the_text_alone(seed: int) -> None:
    story = generate(1, seed)[0]
    assert surprisals((*split(story.text), v.END)) == story.surprisals


def test_surprisals_are_finite_and_not_negative() -> None:
    for story in STORIES:
        assert len(story.words) == len(story.surprisals)
        assert all(math.isfinite(s) and s >= 0.0 for s in story.surprisals)
        assert story.words.index(v.END) == len(story.words) - 1


def test_word_frequencies_agree_with_the_stated_probabilities() -> None:
    pen = CountingWriter(random.Random(99))
    for _ in range(400):
        pen.words, pen.surprisals = [], []
        tell(pen)
    scores = [
        (pen.seen[word] - pen.expected[word]) / math.sqrt(variance)
        for word, variance in pen.variance.items()
        if variance > 20.0
    ]
    assert len(scores) > 60
    assert max(map(abs, scores)) < 4.5
    assert sum(score**2 for score in scores) / len(scores) == pytest.approx(1.0, abs=0.35)


def test_mean_surprisal_agrees_with_the_entropy_of_the_choices() -> None:
    gaps = []
    for story in STORIES[:40]:
        for position in range(0, len(story.words), 3):
            probabilities = next_word_probabilities(story.words[:position])
            assert math.fsum(probabilities.values()) == pytest.approx(1.0)
            assert probabilities[story.words[position]] == pytest.approx(math.exp(-story.surprisals[position]))
            gaps.append(story.surprisals[position] + sum(p * math.log(p) for p in probabilities.values()))
    deviation = math.sqrt(sum(gap**2 for gap in gaps) / len(gaps))
    assert abs(sum(gaps) / len(gaps)) < 4.0 * deviation / math.sqrt(len(gaps))


def test_floor_is_the_same_from_another_seed() -> None:
    floors = [floor_perplexity(generate(400, seed)) for seed in (1, 2)]
    assert floors[0] == pytest.approx(floors[1], rel=0.02)
    assert 2.5 < floors[0] < 6.0


def test_same_seed_same_stories_and_no_global_state() -> None:
    before = random.getstate()
    assert generate(5, 3) == generate(5, 3) != generate(5, 4)
    assert random.getstate() == before


def test_text_is_the_same_on_every_python_version() -> None:
    assert generate(1, 0)[0].text.startswith(
        "at the valley it was a misty day. boris the mason had a wooden shield and a copper fo"
    )


def test_vocabulary_is_closed_and_without_repeats() -> None:
    words = vocabulary()
    assert len(words) == len(set(words))
    assert {word for story in STORIES for word in story.words} <= set(words)


def test_a_text_outside_the_language_is_refused() -> None:
    words = STORIES[0].words
    with pytest.raises(NotInLanguageError, match="word 3"):
        surprisals((*words[:2], "moon", *words[3:]))
    with pytest.raises(NotInLanguageError, match="ends before"):
        surprisals(words[:-1])
    with pytest.raises(NotInLanguageError, match="ends after"):
        surprisals((*words, "the"))
    with pytest.raises(NotInLanguageError, match="complete"):
        next_word_probabilities(words)


def test_things_end_where_they_were_last_put() -> None:
    checked = 0
    for story in STORIES:
        ending = re.search(r"in the end the (\w+) (\w+) lay (\w+ the \w+)\.$", story.text)
        if ending:
            adjective, noun, spot = ending.groups()
            puts = re.findall(rf"put the (?:{adjective} )?{noun} (\w+ the \w+)\.", story.text)
            assert puts[-1] == spot
            checked += 1
    assert checked > 50


def test_an_answer_names_the_holder() -> None:
    asked = 0
    for story in STORIES:
        for noun, holder in re.findall(r"about the (?:\w+ )?(\w+), and s?he said that (\w+) had it", story.text):
            before = story.text.split(" had it")[0]
            if not re.search(rf"(put|found|gave) the (?:\w+ )?{noun} ", before):
                owner = re.search(
                    rf"(\w+) the \w+(?:, who(?: came from the \w+ and)?)? had an? [^.]*\b{noun}\b", story.text
                )
                assert owner is not None
                assert owner.group(1) == holder
                asked += 1
    assert asked > 20


def test_join_and_split_are_opposites() -> None:
    for story in STORIES[:50]:
        assert split(story.text) == story.words[:-1]
        assert join(split(story.text)) == story.text


def test_labelled_examples_hide_the_place_and_use_every_label() -> None:
    examples = labelled(200, seed=8)
    counts = Counter(example.label for example in examples)
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 25
    assert examples == labelled(200, seed=8)
    assert not any(example.text.startswith("at the") for example in examples)
