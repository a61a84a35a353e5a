from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest

from spinecli.demo.story_sampler import EndOfTextError, NotInLanguageError, Reader, Writer

OPTIONS = (
    (("the", "baker"), 1.0),
    (("the", "old", "miller"), 2.0),
    (("anna",), 1.0),
    (("never",), 0.0),
)


def test_a_shared_beginning_gets_the_sum_of_its_phrases() -> None:
    pen = Reader(("the", "old", "miller"))
    assert pen.choose(OPTIONS) == ("the", "old", "miller")
    assert pen.surprisals == pytest.approx([math.log(4 / 3), math.log(3 / 2), 0.0])


def test_a_text_that_stops_tells_what_can_follow() -> None:
    with pytest.raises(EndOfTextError) as caught:
        Reader(("the",)).choose(OPTIONS)
    assert caught.value.probabilities == pytest.approx({"baker": 1 / 3, "old": 2 / 3})


@pytest.mark.parametrize("word", ["never", "moon"])
def test_impossible_words_are_refused(word: str) -> None:
    with pytest.raises(NotInLanguageError, match=word):
        Reader((word,)).choose(OPTIONS)


def test_a_writer_draws_in_proportion_to_the_weights() -> None:
    pen = Writer(Random(3))
    drawn = Counter(pen.choose(OPTIONS) for _ in range(4000))
    assert drawn[("anna",)] == pytest.approx(1000, abs=120)
    assert drawn[("the", "old", "miller")] == pytest.approx(2000, abs=140)
    assert drawn[("never",)] == 0


def test_written_words_cost_nothing() -> None:
    pen = Writer(Random(0))
    pen.write("at", "the")
    assert pen.words == ["at", "the"]
    assert pen.surprisals == [0.0, 0.0]
