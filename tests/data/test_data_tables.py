from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pandas
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from spinecli.data.examples import load_dataset
from spinecli.data.tables import read_table
from spinecli.errors import DataError, MissingPathError

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
        ("rows.jsonl", b'["a", 0]', ["line 1", "not a JSON object"]),
        ("rows.jsonl", b"[" * 100_000, ["line 1", "not JSON"]),
        ("rows.jsonl", b"", ["holds no examples"]),
        ("rows.txt", b" \n\n", ["holds no examples"]),
        ("rows.csv", b"text,label\n", ["holds no examples"]),
        ("rows.csv", b"text,label\na,b,0\n", ["line 2", "3 fields", "2"]),
        ("rows.csv", b'text,label\n"a,0\nb,1\n', ["line 3", "quotes"]),
        ("rows.csv", b'text,label\n"a" b,0\n', ["line 2", "quotes"]),
        ("rows.csv.gz", b"text,label\na,0\n", ["cannot be unpacked"]),
        ("rows.csv.gz", gzip.compress(b"text,label\n" + b"a,0\n" * 999, mtime=0)[:-12], ["cannot be unpacked"]),
        ("rows.csv.xz", b"text", ["cannot be unpacked"]),
        ("rows.csv.bz2", b"text", ["cannot be unpacked"]),
        ("rows.csv.zst", b"text", ["cannot be unpacked"]),
        ("rows.csv.gz", gzip.compress(b"", mtime=0), ["holds no examples"]),
        ("rows.csv", gzip.compress(b"text\na\n", mtime=0), ["a gzip file", ".gz"]),
        ("rows.txt", "one\ntwo".encode("utf-16-le"), ["UTF-16 without a byte order mark"]),
        ("rows.csv", "text,label\ncaf\u00e9,0\n".encode("cp1252"), ["not UTF-8", "byte 14", "Windows-1252"]),
        ("rows.jsonl", b"[\n" + b'{"text": "a"},\n]', ["line 1", "not JSON"]),
        ("rows.json", b"", ["holds no examples"]),
        ("rows.json", b"[]", ["holds no examples"]),
        ("rows.json", b'"text"', ["a single JSON value"]),
        ("rows.json", b'["a", "b"]', ["row 1", "not a JSON object"]),
        ("rows.json", b'[\n{"text": "a"},\n]', ["not JSON at line 3"]),
        ("rows.json", b'{"a": 1}\n{"a": ', ["line 2", "not JSON"]),
        ("rows.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', ["arrays train, test"]),
        ("rows.json", b'{"columns": ["text", "text"], "data": [["a", "b"]]}', ["'text' twice"]),
        ("rows.csv", b"id;text, cleaned;label\n1;a, b;0\n", ["looks separated by ';'"]),
        ("rows.csv", b",,text\n1,2,a,b\n", ["line 2 has 4 fields"]),
        ("rows.tsv", b"text\ttext\na\tb\n", ["'text' twice"]),
        ("rows.txt", b"good \xff bad", ["not UTF-8", "byte 5"]),
        ("rows.parquet", b"PAR1", [".jsonl", ".csv", "convert"]),
        ("rows", b"a", [".jsonl", ".csv", "convert"]),
        ("rows.zip", b"PK\x03\x04", ["a zip archive", "unpack"]),
        ("rows.xlsx", b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", ["office", ".csv"]),
        ("rows.pdf", b"%PDF-1.7", ["a PDF document", ".txt"]),
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


ROWS = [{"text": "a \u00fc", "label": "0"}, {"text": "b, c", "label": "1"}]
PLAIN = 'text,label\r\na \u00fc,0\r\n"b, c",1\r\n'


def rows_of(path: Path) -> list[object]:
    return [row for _, row in read_table(path)]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("rows.csv", lambda text: text.encode()),
        ("rows.CSV", lambda text: text.encode("utf-8-sig")),
        ("rows.csv", lambda text: text.encode("utf-16")),
        ("rows.csv", lambda text: b"\xfe\xff" + text.encode("utf-16-be")),
        ("rows.csv", lambda text: text.encode("utf-32")),
        ("rows.csv.gz", lambda text: gzip.compress(text.encode())),
        ("rows.csv.bz2", lambda text: bz2.compress(text.encode("utf-8-sig"))),
        ("rows.csv.xz", lambda text: lzma.compress(text.encode("utf-16"))),
        ("rows.csv.zst", lambda text: pyarrow.compress(text.encode(), "zstd", asbytes=True)),
        ("rows.csv", lambda text: text.replace("\r\n", ",\r\n").encode()),
    ],
)
def test_packing_and_encoding_change_nothing(tmp_path: Path, name: str, pack: Callable[[str], bytes]) -> None:
    file = tmp_path / name
    file.write_bytes(pack(PLAIN))
    assert [{key: row[key] for key in ("text", "label")} for row in rows_of(file)] == ROWS  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "text;label\na \u00fc;0\nb, c;1\n"),
        ("rows.csv", "text\tlabel\na \u00fc\t0\nb, c\t1\n"),
        ("rows.csv", "text|label\na \u00fc|0\nb, c|1\n"),
        ("rows.tsv", 'text,label\na \u00fc,0\n"b, c",1\n'),
        ("rows.csv", "sep=;\r\ntext;label\r\na \u00fc;0\r\nb, c;1\r\n"),
        ("rows.csv", '"sep=\t"\ntext\tlabel\na \u00fc\t0\nb, c\t1\n'),
    ],
)
def test_a_separator_is_found_by_the_first_line(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8", newline="")
    assert rows_of(file) == ROWS


def test_a_comma_in_the_header_is_the_separator_of_csv(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text;note,label\na;b,0\n")
    assert rows_of(file) == [{"text;note": "a;b", "label": "0"}]
    file.write_text('"text, cleaned";label\na, b;0\n')
    assert rows_of(file) == [{"text, cleaned": "a, b", "label": "0"}]


def test_fields_of_any_length_are_read_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "a" * 300_000 + ",0\n")
    limit = csv.field_size_limit()
    for _, row in read_table(file):
        assert len(str(row["text"])) == 300_000
        assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", '[{"text": "a"}, {"text": "b"}]'),
        ("rows.json", '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}'),
        ("rows.json", '{"text": "a"}\n{"text": "b"}\n'),
        ("rows.jsonl", '[\n{"text": "a"},\n{"text": "b"}\n]'),
        ("rows.jsonl", '[{"text": "a"}, {"text": "b"}]'),
        ("rows.ndjson", '{"text": "a"},\r\n\r\n{"text": "b"},\r\n'),
        ("rows.jsonl", '\ufeff{"text": "a"}\n{"text": "b"}'),
    ],
)
def test_json_is_read_in_every_usual_layout(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8", newline="")
    assert rows_of(file) == [{"text": "a"}, {"text": "b"}]


FRAMES = {
    "default": pandas.DataFrame({"text": ["a", "b"], "label": [1, 0]}),
    "one row": pandas.DataFrame({"text": ["a"]}),
    "own names": pandas.DataFrame({"Review": ["a", "b", None], "stars": [1, 2, 3]}),
    "filtered": pandas.DataFrame({"text": ["a", "b"], "label": [1, 0]}, index=[7, -3]),
    "named rows": pandas.DataFrame({"text": ["a", "b"], "label": [1, 0]}, index=["x", "y"]),
    "conversations": pandas.DataFrame({"messages": [[{"role": "user", "content": "a"}]] * 2}),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("orient", ["columns", "index", "split", "list", "table"])
def test_what_pandas_writes_is_one_table_in_every_layout(
    tmp_path: Path, frame: pandas.DataFrame, orient: Literal["columns", "index", "split", "list", "table"]
) -> None:
    file = tmp_path / "rows.json"
    frame.to_json(file, orient="records")
    expected = read_table(file)
    if orient == "list":
        file.write_text(json.dumps({name: frame[name].tolist() for name in frame}).replace("NaN", "null"))
    else:
        frame.to_json(file, orient=orient)
    table = read_table(file)
    # the layout "table" writes the names of the rows as a column
    rows = [(number, {name: row[name] for name in row if name != "index"}) for number, row in table]
    assert rows == list(expected)
    assert tuple(name for name in table.columns if name != "index") == expected.columns
    assert (table.unit, table.reference) == (expected.unit, expected.reference)


@pytest.mark.parametrize(
    "found",
    [
        {"0": {"0": "a"}},
        {"x": {"y": "a"}},
        {"text": {"0": "a"}, "label": {"1": 0}},
        {"text": ["a", "b"], "label": [0]},
        {"text": "a", "label": ["b"]},
        {"columns": [["text"]], "data": [["a"]]},
        {"columns": ["text"], "data": [["a", "b"]]},
        {"columns": ["text"], "data": [["a"]], "dtypes": ["str"]},
    ],
)
def test_an_object_that_is_no_table_is_one_row(tmp_path: Path, found: object) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(found))
    assert rows_of(file) == [found]


def test_a_table_of_pandas_without_rows_holds_no_examples(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for content in ('{"columns":["text"],"index":[],"data":[]}', '{"text": [], "label": []}'):
        file.write_text(content)
        with pytest.raises(DataError, match=r"rows\.json holds no examples"):
            read_table(file)


def test_parquet_gives_plain_values(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": pyarrow.array([3, 1], pyarrow.int8())}), file)
    table = read_table(file)
    assert (table.columns, list(table)) == (
        ("text", "label"),
        [(1, {"text": "a", "label": 3}), (2, {"text": "b", "label": 1})],
    )
    assert table.place(2) == f"{file} row 2"
    assert load_dataset(str(file)).labels == ("1", "3")
    packed = tmp_path / "rows.parquet.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert list(read_table(packed)) == list(table)
    parquet.write_table(pyarrow.table({"text": [["a"], ["b"]], "label": [0, 1]}), file)
    with pytest.raises(DataError, match=r"row 1 has \['a'\] in column 'text', which is not text"):
        load_dataset(str(file))


def test_columns_without_a_name_are_numbered(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(",text,label,\n0,a,x,\n1,b,y,\n")
    assert read_table(file).columns == ("column 1", "text", "label", "column 4")


def test_only_one_row_is_held(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + f"{'word ' * 200},0\n" * 20_000)
    table = read_table(file)
    tracemalloc.start()
    assert sum(1 for _ in table) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # a chunk of rows and the reader's own buffer, of a file of 20 MB
    assert peak < 8e6
