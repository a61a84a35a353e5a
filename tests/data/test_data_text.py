from __future__ import annotations

import json
from pathlib import Path

import pytest

from spinecli.data.text import default_text, load_text
from spinecli.errors import CalibrationTextError, MissingPathError, OfflineError


def test_plain_files_are_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "text.md"
    file.write_text("one\n\ntwo ü")
    text = load_text(str(file))
    assert (text.content, text.reference) == ("one\n\ntwo ü", str(file))


@pytest.mark.parametrize("column", ["text", "content", "sentence", "story", "document"])
def test_jsonl_joins_its_text_column(tmp_path: Path, column: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"id": 1, column: word}) for word in ("one", "two")) + "\n\n")
    assert load_text(str(file)).content == "one\n\ntwo"


def test_jsonl_keeps_line_separators_inside_strings(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 unescaped, and web text is full of them."""
    rows = ["one\u2028two", "three\u0085four", "five\u000bsix"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert load_text(str(file)).content == "\n\n".join(rows)


def test_jsonl_with_carriage_returns(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert load_text(str(file)).content == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b'{"text": "one"}\n{"text": ', ["line 2", "not JSON"]),
        ("rows.jsonl", b'{"text": "one"}\n{"body": "two"}', ["line 2", "text columns"]),
        ("rows.jsonl", b'["one"]', ["line 1", "text columns"]),
        ("rows.jsonl", b'{"text": 7}', ["line 1"]),
        ("text.txt", b"good \xff bad", ["not UTF-8", "byte 5"]),
        ("text.txt", b"", ["holds no text"]),
        ("text.txt", b" \n\t ", ["holds no text"]),
        ("rows.jsonl", b'{"text": "  "}', ["holds no text"]),
    ],
)
def test_unusable_files_are_told_with_their_place(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(CalibrationTextError) as caught:
        load_text(str(file))
    assert all(word in str(caught.value) for word in [name, *words])


def test_directories_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(CalibrationTextError, match="directory"):
        load_text(str(tmp_path))
    with pytest.raises(CalibrationTextError, match="builtin:python-docs"):
        load_text("builtin:nothing")


def test_an_absent_file_is_told_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"absent\.txt does not exist"):
        load_text(str(tmp_path / "absent.txt"))


def test_a_hub_data_set_without_a_network() -> None:
    with pytest.raises(OfflineError, match="somebody/texts is no file here"):
        load_text("somebody/texts")


def test_built_in_texts_are_there_and_do_not_overlap() -> None:
    manual, calibration, evaluation = (
        load_text(f"builtin:{name}").content for name in ("python-docs", "tiny-calibration", "tiny-evaluation")
    )
    assert min(map(len, (manual, calibration, evaluation))) > 50_000
    assert calibration[:2000] not in evaluation
    assert calibration == load_text("builtin:tiny-calibration").content


def test_the_built_in_model_calibrates_on_its_own_language() -> None:
    assert default_text(builtin_model=True).reference == "builtin:tiny-calibration"
    assert default_text(builtin_model=False).reference == "builtin:python-docs"
