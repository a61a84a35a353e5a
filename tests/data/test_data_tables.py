from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.data.tables import read_table
from spinecli.errors import DataError, MissingPathError
from spinecli.federation.data.examples import load_dataset

# no carriage return alone: what is written is what comes back, also where csv normalises nothing
CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from(",\t\"'\n"), min_size=1)


@given(cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_the_same_rows_come_out_of_every_format(cells: list[tuple[str, str]], tmp_path_factory: object) -> None:
    place = Path(tmp_path_factory.mktemp("formats"))  # type: ignore[attr-defined]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=delimiter).writerows([("text", "label"), *cells])
        (place / f"rows{suffix}").write_bytes(text.getvalue().encode())
    rows = [{"text": text, "label": label} for text, label in cells]
    (place / "rows.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline=""
    )
    for suffix in (".csv", ".tsv", ".jsonl"):
        table = read_table(place / f"rows{suffix}")
        assert (table.columns, [row for _, row in table]) == (("text", "label"), rows)


def test_a_text_file_is_one_example_a_line(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two\n \nthree")
    table = read_table(file)
    assert list(table) == [(1, {"text": "one"}), (3, {"text": "  two"}), (5, {"text": "three"})]
    assert table.place(5) == f"{file} line 5"


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    file = tmp_path / "sheet.csv"
    file.write_bytes("\ufefftext,label\na,0\n".encode())
    assert read_table(file).columns == ("text", "label")


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('text,label\n"one\nand more",0\n\n,1\n')
    with pytest.raises(DataError, match=r"rows\.csv line 5 has an empty text"):
        load_dataset(str(file))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b'{"text": "a", "label": 0}\n\n{"text": ', ["line 3", "not JSON"]),
        ("rows.jsonl", b'["a", 0]', ["line 1", "no JSON object"]),
        ("rows.jsonl", b"[" * 100_000, ["line 1", "not JSON"]),
        ("rows.jsonl", b"", ["holds no examples"]),
        ("rows.txt", b" \n\n", ["holds no examples"]),
        ("rows.csv", b"text,label\n", ["holds no examples"]),
        ("rows.csv", b"text,label\na,b,0\n", ["line 2", "3 fields", "2"]),
        ("rows.csv", b'text,label\n"a,0\nb,1\n', ["line 3", "quotes"]),
        ("rows.csv", b'text,label\n"a" b,0\n', ["line 2", "quotes"]),
        ("rows.tsv", b"text\ttext\na\tb\n", ["'text' twice"]),
        ("rows.txt", b"good \xff bad", ["not UTF-8", "byte 5"]),
        ("rows.parquet", b"PAR1", [".jsonl", ".csv", "convert"]),
        ("rows", b"a", [".jsonl", ".csv", "convert"]),
    ],
)
def test_unusable_files_are_told_with_their_place(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_dataset(str(file))
    message = str(caught.value)
    assert all(word in message for word in [str(file), *words]), message
    assert "\n" not in message
    assert len(message) < len(str(file)) + 250


def test_an_absent_file_is_told_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"absent\.csv does not exist"):
        load_dataset(str(tmp_path / "absent.csv"))
    with pytest.raises(MissingPathError, match=r"data/absent\.csv does not exist"):
        load_dataset("data/absent.csv")
