from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.data.sources import TextSource, deal, kind_names, read_sources, shared_out
from spinecli.errors import OptionError

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 100), st.floats(0.01, 9).map(lambda x: round(x, 2))), min_size=1, max_size=9
)


@pytest.mark.parametrize(
    ("word", "reference", "weight"),
    [
        ("wiki.txt", "wiki.txt", 1.0),
        ("chat.jsonl:0.3", "chat.jsonl", 0.3),
        ("self:.5", "self", 0.5),
        ("builtin:python-docs", "builtin:python-docs", 1.0),
        ("builtin:python-docs:2", "builtin:python-docs", 2.0),
        ("owner/texts:train", "owner/texts:train", 1.0),
        ("owner/texts:train:1e-1", "owner/texts:train", 0.1),
        ("notes:3.txt", "notes:3.txt", 1.0),
    ],
)
def test_the_weight_stands_behind_the_last_colon_if_it_is_a_number(word: str, reference: str, weight: float) -> None:
    assert read_sources([word]) == (TextSource(reference, weight),)


def test_a_path_that_exists_with_its_colon_has_no_weight(tmp_path: Path) -> None:
    file = tmp_path / "at 12:30"
    file.write_text("noon")
    assert read_sources([str(file)]) == (TextSource(str(file)),)
    assert read_sources([f"{file}:2"]) == (TextSource(str(file), 2.0),)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["self:0"], "self:0 has the weight 0; a weight is a number above 0"),
        (["self:-1"], "above 0"),
        (["self:nan"], "above 0"),
        (["self:inf"], "above 0"),
        (["a.txt:30%"], r"a\.txt:30% has the weight 30%, which is no number; write it as a\.txt:0\.5"),
        (["a.txt:0,3"], "which is no number"),
        ([":0.3"], "names no text"),
        ([" "], "names no text"),
        ([], "names no text"),
        (["self", "a.txt", "self:2"], "names self more than once"),
        (["a.txt:1", "a.txt"], r"names a\.txt more than once"),
    ],
)
def test_mistakes_in_words_are_told(words: list[str], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        read_sources(words)


def test_one_file_by_two_names_is_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    with pytest.raises(OptionError, match="more than once"):
        read_sources(["a.txt", "./a.txt:2"])


def test_files_are_called_by_their_names_until_they_share_one(tmp_path: Path) -> None:
    files = [tmp_path / "one" / "a.txt", tmp_path / "two" / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("words")
    names = kind_names(read_sources([*map(str, files), "self", "builtin:python-docs"]))
    assert names == (str(files[0]), str(files[1]), "b.txt", "self", "builtin:python-docs")


@given(WEIGHTS, st.integers(1, 150))
def test_the_first_rows_hold_every_source_in_its_share_to_within_a_row(weights: list[float], rows: int) -> None:
    dealt, had = deal(weights, rows), Counter[int]()
    exact = [Fraction(str(weight)) for weight in weights]
    for row, source in enumerate(dealt, start=1):
        had[source] += 1
        for number, weight in enumerate(exact):
            assert abs(had[number] - row * weight / sum(exact)) < 1


@given(WEIGHTS, st.data())
def test_the_last_rows_hold_every_source_too(weights: list[float], data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 100))
    last = data.draw(st.integers(1, rows))
    had = Counter(deal(weights, rows)[-last:])
    for number, weight in enumerate(weights):
        assert abs(had[number] - last * weight / sum(weights)) < 2


@given(WEIGHTS, st.integers(1, 60), st.data())
def test_others_fill_up_what_a_short_source_lacks(weights: list[float], rows: int, data: st.DataObject) -> None:
    size = len(weights)
    available = data.draw(st.lists(st.integers(0, 60), min_size=size, max_size=size))
    given_ = shared_out(weights, rows, available)
    assert all(count <= most for count, most in zip(given_, available, strict=True))
    assert sum(given_) == min(rows, sum(available))
