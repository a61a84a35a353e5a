from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy
import pytest
import torch
from conversing import chat_tokenizer
from families import tokenizer
from safetensors.torch import save

from spinecli.data.python_docs import python_docs
from spinecli.data.text import Text, load_text
from spinecli.errors import CalibrationTextError, MissingPathError, OfflineError, TokenizerError


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
        ("rows.jsonl", b'{"text": 7}', ["line 1", "no text in column 'text'"]),
        ("rows.jsonl", b'{"text": "a"}\n{"text": null}', ["line 2", "no text in column 'text'"]),
        ("rows.jsonl", b'{"text": ["a", "b"]}', ["line 1", "no text in column 'text'"]),
        ("rows.csv", b"body,label\na,0\n", ["line 2", "none of the text columns"]),
        ("rows.csv", b"a;body;c, b\nc;d;e, f\n", ["looks separated by ';'"]),
        ("text.txt.gz", b"text", ["cannot be unpacked"]),
        ("rows.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n{"text": "b"}', ["line 2", "conversation"]),
        ("rows.jsonl", b'{"messages": []}', ["line 1", "no list of messages"]),
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


def _archive(kind: str) -> bytes:
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("a.txt", "a text, which is stored as it is" * 500)
    else:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT if kind == "gnu" else None) as archive:
            member = tarfile.TarInfo("a.txt")
            member.size = 16_000
            archive.addfile(member, io.BytesIO(b"a text " * 3000))
    return packed.getvalue()


def _array() -> bytes:
    written = io.BytesIO()
    numpy.save(written, numpy.zeros(999))
    return written.getvalue()


@pytest.mark.parametrize(
    ("content", "form", "way_out"),
    [
        (_archive("zip"), "a zip archive", "unpack"),
        (_archive("tar"), "a tar archive", "unpack"),
        (_archive("gnu"), "a tar archive", "unpack"),
        (b"7z\xbc\xaf\x27\x1c\0\x04", "a 7z archive", "unpack"),
        (b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", "office program", ".txt"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document", ".txt"),
        (_array(), "a NumPy array", ".jsonl"),
        (pickle.dumps(["a text"]), "a Python pickle", ".jsonl"),
        (b"GGUF\x03\0\0\0" + b"a" * 99, "a model in GGUF", "a file of text"),
        (save({"weight": torch.zeros(8)}), "weights in safetensors", "a file of text"),
    ],
)
def test_a_file_that_is_no_text_is_called_what_it_is(tmp_path: Path, content: bytes, form: str, way_out: str) -> None:
    for name in ("x.txt", "x", "x.csv", "x.jsonl", "x.txt.gz"):
        file = tmp_path / name
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(CalibrationTextError, match=rf"^{file} is .*{form} and not text; .*{way_out}"):
            load_text(str(file))


def test_a_text_may_begin_as_a_file_of_another_kind_does(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    for content in ("%PDF- begins one", "BZh", "PAR1", "GGUF is a format", "PK", "7z", "Rar!", "ARROW1"):
        file.write_text(content)
        assert load_text(str(file)).content == content


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


def test_the_python_text_is_long_and_holds_nothing_of_the_manual_that_is_measured_on() -> None:
    from pydoc_data.topics import topics

    text, measured = load_text("builtin:python-docs").content, "\n".join(topics.values())[:400_000]
    assert len(text) > 1_000_000
    pieces = {piece.strip() for piece in measured.split("\n\n") if len(piece.strip()) > 100}
    assert len(pieces) > 500
    assert [piece for piece in pieces if piece in text] == []
    assert python_docs.__wrapped__() == text


def test_built_in_texts_are_there_and_do_not_overlap() -> None:
    manual, calibration, evaluation = (
        load_text(f"builtin:{name}").content for name in ("python-docs", "tiny-calibration", "tiny-evaluation")
    )
    assert min(map(len, (manual, calibration, evaluation))) > 50_000
    assert calibration[:2000] not in evaluation
    assert calibration == load_text("builtin:tiny-calibration").content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "id,Text\n1,one\n2,two\n"),
        ("rows.csv", "id;sentence\n1;one\n2;two\n"),
        ("rows.tsv", "id\tstory\n1\tone\n2\ttwo\n"),
        ("rows.json", '[{"document": "one"}, {"document": "two"}]'),
        ("rows.json", '{"content": "one"}\n{"content": "two"}'),
        ("rows.jsonl", '\ufeff{"text": "one"}\n{"text": "two"}'),
        ("rows.jsonl", '{"question": "q", "sentence": "one"}\n{"question": "r", "sentence": "two"}'),
    ],
)
def test_tables_give_the_text_of_their_rows(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    assert load_text(str(file)).content == "one\n\ntwo"


def test_columns_that_belong_together_are_read_together(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("premise,hypothesis,label\na,b,0\nc,d,1\n")
    assert load_text(str(file)).content == "a\nb\n\nc\nd"
    file.write_text("instruction,input,output\nadd,1 2,3\ngreet,,hello\n")
    assert load_text(str(file)).content == "add\n1 2\n3\n\ngreet\nhello"


def test_plain_text_is_raw_whatever_its_packing(tmp_path: Path) -> None:
    content = 'a,b\n\n{"text": 1}\n'
    for name in ("x.txt", "x.md", "x.rst", "x"):
        (tmp_path / name).write_text(content)
        assert load_text(str(tmp_path / name)).content == content
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(content.encode("utf-16")))
    assert load_text(str(tmp_path / "x.txt.gz")).content == content
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert load_text(str(tmp_path / "x.txt")).content == "one\ntwo"


def test_conversations_are_written_by_the_template_of_each_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
        '{"messages": [{"role": "user", "content": "so"}]}\n'
    )
    text = load_text(str(file))
    assert text.content_for(chat_tokenizer()) == "<s><user>hi</s><assistant>ho</s><s><user>so</s>"
    assert text.content_for(chat_tokenizer(), "<s>") == "<user>hi</s><assistant>ho</s><user>so</s>"
    other = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"
    )
    assert text.content_for(other) == "user: hi assistant: ho\nuser: so\n"
    with pytest.raises(TokenizerError, match=r"chat\.jsonl holds conversations and .* no chat template"):
        text.content_for(tokenizer())
    plain = Text("x", "x", ("as it is",))
    assert plain.content_for(tokenizer()) == "as it is"


def test_a_hub_data_set_is_streamed_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def answer(name: str, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: ({"Text": f"{index:04}"} for index in range(100)))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load_text("somebody/texts", limit_characters=10).content == "0000\n\n0001\n\n0002"
    load_text("somebody/texts:test")
    assert asked == [("somebody/texts", "train", True), ("somebody/texts", "test", True)]
