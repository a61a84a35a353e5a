from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from federated_samples import shared, write_rows
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from spinecli.config import read_config
from spinecli.data.config import ExamplesConfig
from spinecli.data.conversations import Turn
from spinecli.data.example_columns import GroupColumn
from spinecli.data.examples import Dataset, Example, load_dataset
from spinecli.data.labels import read_labels
from spinecli.data.splits import Splits
from spinecli.data.tables import Table
from spinecli.data.text import load_text
from spinecli.demo.vocabulary import TOPICS
from spinecli.errors import DataError, OfflineError, OptionError


def load(tmp_path: Path, rows: list[dict[str, Any]], group: GroupColumn | None = None, **options: Any) -> Dataset:
    return load_dataset(write_rows(tmp_path / "rows.jsonl", rows), ExamplesConfig(**options), group=group)


def label_table_of(values: list[Any]) -> Table:
    return Table("made", ("label",), lambda: iter(enumerate(({"label": value} for value in values), start=1)))


@pytest.mark.parametrize("label", ["label", "labels", "category", "class", "Label"])
@pytest.mark.parametrize(
    ("columns", "text", "pair"),
    [
        (["text"], "text", None),
        (["Sentence"], "Sentence", None),
        (["content", "id"], "content", None),
        (["question"], "question", None),
        (["sentence1"], "sentence1", None),
        (["sentence1", "sentence2"], "sentence1", "sentence2"),
        (["hypothesis", "premise"], "premise", "hypothesis"),
        (["question", "sentence"], "question", "sentence"),
        (["question1", "question2"], "question1", "question2"),
    ],
)
def test_usual_columns_are_recognised(
    tmp_path: Path, columns: list[str], text: str, pair: str | None, label: str
) -> None:
    rows = [{**{column: f"{column} {index}" for column in columns}, label: index} for index in range(2)]
    found = load(tmp_path, rows)
    assert found.task == "classification"
    assert found.labels == ("0", "1")
    assert found.examples == tuple(
        Example(f"{text} {index}", pair=f"{pair} {index}" if pair else None, label=index) for index in range(2)
    )


def test_named_columns_come_before_recognised_ones(tmp_path: Path) -> None:
    rows = [{"text": "a", "body": "b", "title": "c", "label": 0, "mood": name} for name in ("sad", "glad")]
    found = load(tmp_path, rows, text_column="body", pair_column="title", label_column="mood")
    assert found.labels == ("glad", "sad")
    assert found.examples == (Example("b", "c", 1), Example("b", "c", 0))
    assert load(tmp_path, rows, pair_column="title", label_column="mood").examples[0] == Example("a", "c", 1)


@pytest.mark.parametrize(
    ("question", "extra", "reply"),
    [("instruction", "input", "output"), ("instruction", "context", "response"), ("prompt", "input", "completion")],
)
def test_instructions_are_a_language_task(tmp_path: Path, question: str, extra: str, reply: str) -> None:
    rows = [
        {question: "add", extra: "1 2", reply: "3", "category": "sums"},
        {question: "greet", extra: "", reply: "hello", "category": "manners"},
        {question: "wait", reply: "..", "category": "manners"},
    ]
    found = load(tmp_path, rows)
    assert (found.task, found.labels) == ("language", ())
    assert found.examples == (
        Example("add", "1 2", answer="3"),
        Example("greet", answer="hello"),
        Example("wait", answer=".."),
    )
    # labels serve to deal the examples out, and only when they are asked for
    named = load(tmp_path, rows, label_column="category")
    assert (named.task, named.labels) == ("language", ("manners", "sums"))
    assert [example.label for example in named.examples] == [1, 0, 0]


def test_text_alone_is_a_language_task_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text(" one \ntwo\n")
    found = load_dataset(str(file))
    assert (found.task, found.examples) == ("language", (Example(" one "), Example("two")))
    labelled = load(tmp_path, [{"text": " a ", "label": 0}, {"text": "b", "label": 1}], task="language")
    assert labelled.examples == (Example(" a "), Example("b"))


def test_labels_that_differ_by_case_or_blanks_alone_are_named_in_one_note(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\na,Positive\nb,positive \nc,no\nd,positive\n")
    found = load_dataset(str(file))
    assert found.labels == ("Positive", "no", "positive")
    (note,) = found.notes
    assert note.startswith(f"{file} has labels in column 'label' that differ by case or blanks alone: ")
    assert "'Positive' and 'positive' and 'positive '" in note
    assert Splits(found.subset([0]), found.subset([1])).notes == (note,)
    assert load(tmp_path, [{"text": "a", "label": 0}, {"text": "b", "label": 1}]).notes == ()


def test_conversations_are_read_where_nothing_else_is_a_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (example,) = load(tmp_path, [{"messages": messages, "source": "x"}]).examples
    assert example == Example("hi", answer="ho", conversation=(Turn("user", "hi"),))
    assert load(tmp_path, [{"text": "a", "messages": messages}]).examples == (Example("a"),)
    assert load(tmp_path, [{"text": "a", "messages": messages}], text_column="messages").examples == (example,)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CHAT_CSV = 'messages,source\n"' + json.dumps(CHAT).replace('"', '""') + '",x\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", json.dumps(CHAT)),
        ("rows.json", json.dumps(CHAT, indent=1)),
        ("rows.jsonl", json.dumps(CHAT)),
        ("rows.json", json.dumps([CHAT])),
        ("rows.jsonl", json.dumps([CHAT])),
        ("rows.json", json.dumps({"dialogue": CHAT})),
        ("rows.json", json.dumps({"messages": CHAT, "tags": ["a", "b"]})),
        ("rows.json", json.dumps({"messages": [CHAT], "tags": ["a"]})),
        ("rows.json", json.dumps([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}])),
        ("rows.jsonl", json.dumps({"messages": json.dumps(CHAT)})),
        ("rows.csv", CHAT_CSV),
    ],
)
def test_one_conversation_is_one_in_every_layout(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    assert load_dataset(str(file)).examples == (Example("hi", answer="ho", conversation=(Turn("user", "hi"),)),)
    (conversation,) = load_text(str(file)).conversations
    assert conversation == (Turn("user", "hi"), Turn("assistant", "ho"))


def test_a_line_may_be_a_conversation_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(CHAT)}\n{json.dumps(CHAT[:1] + CHAT)}\n")
    assert [len(one.conversation) for one in load_dataset(str(file)).examples] == [1, 2]


def test_a_column_of_strings_in_parquet_may_hold_conversations(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"messages": [json.dumps(CHAT)] * 2}), file)
    assert load_dataset(str(file)).examples == (Example("hi", answer="ho", conversation=(Turn("user", "hi"),)),) * 2


def test_groups_are_read_only_when_asked_for(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": 0, "speaker": "anna", "town": 7},
        {"text": "b", "label": 1, "speaker": "emil", "town": 8},
    ]
    assert [example.group for example in load(tmp_path, rows).examples] == [None, None]
    assert [example.group for example in load(tmp_path, rows, group=GroupColumn()).examples] == ["anna", "emil"]
    assert [example.group for example in load(tmp_path, rows, group=GroupColumn("town")).examples] == ["7", "8"]


@pytest.mark.parametrize(
    ("values", "names", "indices"),
    [
        ([10, 9, 2, 9], ("2", "9", "10"), (2, 1, 0, 1)),
        (["10", "9", "2"], ("2", "9", "10"), (2, 1, 0)),
        ([1.0, 0.0], ("0", "1"), (1, 0)),
        (["1.0", "0", "-1"], ("-1", "0", "1"), (2, 1, 0)),
        ([True, False], ("false", "true"), (1, 0)),
        (["True", "false"], ("false", "true"), (1, 0)),
        ([" b", "a ", "b"], ("a", "b"), (1, 0, 1)),
        (["10", "9", "x"], ("10", "9", "x"), (0, 1, 2)),
        (["007", "7"], ("007", "7"), (0, 1)),
    ],
)
def test_labels_become_sorted_names(values: list[Any], names: tuple[str, ...], indices: tuple[int, ...]) -> None:
    found = read_labels(label_table_of(values), "label")
    assert (found.names, found.indices) == (names, indices)


# digits would make fractions, which are refused
WORDS = st.text(st.characters(exclude_categories=["Cs", "Nd"])).filter(
    lambda word: word.strip().lower() not in ("", "nan")
)


@given(values=st.one_of(st.lists(kind, min_size=1) for kind in (st.integers(), st.booleans(), WORDS)))
def test_names_do_not_depend_on_the_order_of_rows_and_map_back(values: list[Any]) -> None:
    found = read_labels(label_table_of(values), "label")
    assert len(set(found.names)) == len(found.names) == len(set(found.indices))
    assert read_labels(label_table_of(values[::-1]), "label").names == found.names
    assert read_labels(label_table_of(values), "label", known=found.names) == found


def test_one_set_in_two_formats_maps_to_the_same_names() -> None:
    for typed, written in (([0, 1], ["1.0", "0"]), ([False, True], ["TRUE", "False"]), (["01", "x"], ["x", "01"])):
        names = read_labels(label_table_of(typed), "label").names
        assert read_labels(label_table_of(written), "label", known=names).indices == (1, 0)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, None], ["line 2", "no label"]),
        ([0, float("nan")], ["line 2", "no label"]),
        (["a", " "], ["line 2", "no label"]),
        (["a", "NaN"], ["line 2", "no label"]),
        ([0, 0.5], ["line 2", "whole number"]),
        (["1", "0.5"], ["line 2", "whole number"]),
        ([0, float("inf")], ["line 2", "whole number"]),
        ([0, "a"], ["line 2", "text", "a number", "in the same way"]),
        ([0, True], ["line 2", "true or false", "in the same way"]),
        ([0, [1]], ["line 2", "a list"]),
        ([3, 3], ["only the label '3'"]),
    ],
)
def test_unusable_labels_are_told_with_their_row(tmp_path: Path, labels: list[Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, [{"text": "a", "label": label} for label in labels])
    assert all(word in str(caught.value) for word in ["rows.jsonl", "'label'", *words]), caught.value


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"label": 1, "body": "a"}, {}, ["none of the text columns", "label, body", "--text-column"]),
        ({"text": "a", "label": 0}, {"label_column": "mood"}, ["no column 'mood'", "text, label"]),
        ({"text": "a", "label": 0}, {"text_column": "body"}, ["no column 'body'", "text, label"]),
        ({"text": "a", "label": 0}, {"group": GroupColumn("who")}, ["no column 'who'", "text, label"]),
        ({"text": "a", "label": 0}, {"group": GroupColumn()}, ["client, speaker", "column:NAME", "text, label"]),
        ({"text": " ", "label": 0}, {}, ["line 1", "empty text"]),
        ({"text": None, "label": 0}, {}, ["line 1", "empty text"]),
        ({"text": 7, "label": 0}, {}, ["line 1", "7", "not text"]),
        ({"text": "a\ud800", "label": 0}, {}, ["line 1", "surrogate"]),
        ({"text": "a", "label": 0, "user": ""}, {"group": GroupColumn()}, ["line 1", "no group", "'user'"]),
        ({"sentence1": "a", "sentence2": "", "label": 0}, {}, ["line 1", "'sentence2'"]),
        ({"instruction": "a", "input": 3, "output": "b"}, {}, ["line 1", "'input'"]),
        ({"instruction": "a", "output": ""}, {}, ["line 1", "'output'"]),
    ],
)
def test_unusable_rows_are_told(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], words: list[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "label": 1}) + "\n")
    group = options.get("group")
    config = ExamplesConfig(**{name: value for name, value in options.items() if name != "group"})
    with pytest.raises(DataError) as caught:
        load_dataset(str(file), config, group=group)
    assert all(word in str(caught.value) for word in ["rows.jsonl", *words]), caught.value


def test_classification_needs_a_label_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the label columns label, labels, category, class; .*: text"):
        load(tmp_path, [{"text": "a"}], task="classification")


def test_contradicting_options_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "a", "title": "b"}]
    with pytest.raises(OptionError, match="--pair-column"):
        load(tmp_path, rows, pair_column="title", task="language")
    with pytest.raises(OptionError, match="--limit must be at least 1"):
        read_config(ExamplesConfig, None, {"limit": 0})


def test_a_limit_reaches_over_the_whole_file(tmp_path: Path) -> None:
    rows = [{"text": f"t{index}", "label": index // 50} for index in range(100)]
    found = load(tmp_path, rows, limit=10)
    assert [example.text for example in found.examples] == [f"t{index}" for index in range(0, 100, 10)]
    assert {example.label for example in found.examples} == {0, 1}
    assert len(load(tmp_path, rows, limit=1000)) == 100


def test_the_sum_is_that_of_the_content(tmp_path: Path) -> None:
    rows = [{"text": "ä, b", "label": 0}, {"text": "c", "label": 1}]
    one = load(tmp_path, rows).source()
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_text('label,text\n0,"ä, b"\n1,c\n', encoding="utf-8")
    assert load_dataset(str(elsewhere)).source().digest == one.digest
    assert one.reference == str(tmp_path / "rows.jsonl")
    for other in (rows[::-1], [{**rows[0], "label": 1}, {**rows[1], "label": 0}], [rows[0], {"text": "d", "label": 1}]):
        assert load(tmp_path, other).source().digest != one.digest


def test_the_built_in_topics() -> None:
    train, validation = load_dataset("builtin:tiny-topics"), load_dataset("builtin:tiny-topics-validation")
    assert validation == load_dataset("builtin:tiny-topics-validation")
    assert set(train.labels) == set(validation.labels) == set(TOPICS)
    assert min(sum(one.label == label for one in train.examples) for label in range(4)) > len(train) / 5
    assert not {one.text for one in train.examples} & {one.text for one in validation.examples}
    with pytest.raises(DataError, match="builtin:tiny-topics"):
        load_dataset("builtin:nothing")


def test_a_hub_data_set_without_a_network() -> None:
    with pytest.raises(OfflineError, match="somebody/texts is no file here"):
        load_dataset("somebody/texts")


def test_a_hub_data_set_is_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load_dataset("somebody/texts").examples == (Example("a", label=1), Example("b", label=0))
    load_dataset("somebody/texts:test")
    assert asked == [("somebody/texts", "train"), ("somebody/texts", "test")]
    with pytest.raises(DataError, match="somebody/texts:train has no column 'mood'; its columns are sentence, label"):
        load_dataset("somebody/texts", ExamplesConfig(label_column="mood"))

    def refuse(name: str, split: str) -> datasets.Dataset:
        raise ValueError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"Config name is missing\); save it"):
        load_dataset("somebody/texts")


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "task", "labels", "examples"),
    [
        ("sst2", "classification", ("0", "1"), 67349),
        ("ag_news", "classification", ("0", "1", "2", "3"), 10001),
        ("alpaca_en_1000", "language", (), 999),
        ("shakespeare_by_speaker", "language", (), 141),
    ],
)
def test_real_sets(name: str, task: str, labels: tuple[str, ...], examples: int) -> None:
    found = load_dataset(str(shared("datasets", name)), group=GroupColumn() if name.endswith("speaker") else None)
    assert (found.task, found.labels, len(found)) == (task, labels, examples)
    if name.endswith("speaker"):
        assert len({example.group for example in found.examples}) == examples
