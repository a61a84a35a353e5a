from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.errors import DataError
from spinecli.evaluation.labelled import match_labels

_NAMES = st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=8, unique=True)


@given(_NAMES, st.randoms(use_true_random=False))
def test_names_are_found_wherever_they_stand(names: list[str], chance: object) -> None:
    labels = sorted(names)
    chance.shuffle(names)  # type: ignore[attr-defined]
    match = match_labels(labels, "data", names, "model")
    assert [names[output] for output in match.outputs] == labels
    assert match.by == "name"


@pytest.mark.parametrize(
    ("labels", "names", "outputs", "by"),
    [
        (["b", "a"], ["a", "b", "c"], (1, 0), "name"),
        (["negative", "positive"], ["POSITIVE", "NEGATIVE"], (1, 0), "name"),
        (["a", "A"], ["A", "a"], (1, 0), "name"),
        (["0", "1"], ["1", "0"], (1, 0), "name"),
        (["0", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"], (0, 2), "position"),
        (["0", "1"], ["NEGATIVE", "POSITIVE"], (0, 1), "position"),
        (["1", "2"], ["LABEL_0", "LABEL_1"], (0, 1), "position"),
        (["farm", "sea"], ["LABEL_0", "LABEL_1"], (0, 1), "position"),
    ],
)
def test_which_output_stands_for_which_label(
    labels: list[str], names: list[str], outputs: tuple[int, ...], by: str
) -> None:
    match = match_labels(labels, "data", names, "model")
    assert (match.outputs, match.by) == (outputs, by)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["farm", "sea"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["farm", "sea"], ["farm", "town"]),
        (["1", "2"], ["NEGATIVE", "POSITIVE"]),
        (["0", "1"], ["1", "2"]),
        (["A", "a"], ["a", "b"]),
        (["a", "b"], ["a", "a"]),
    ],
)
def test_what_does_not_match_names_both_sides(labels: list[str], names: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        match_labels(labels, "the data", names, "the model")
    sentence = str(caught.value)
    assert f"the data has {len(labels)} labels ({', '.join(labels)})" in sentence
    assert f"the model answers with {len(names)} ({', '.join(names)})" in sentence


def test_long_lists_are_cut_short() -> None:
    with pytest.raises(DataError, match=r"with 300 \(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\)"):
        match_labels(["x", "y"], "data", [str(index) for index in range(300)], "model")
