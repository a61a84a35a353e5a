from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from federated_samples import labelled_set, stories, write_rows
from hypothesis import given
from hypothesis import strategies as st

from spinecli.data.config import ExamplesConfig
from spinecli.data.example_columns import GroupColumn
from spinecli.data.examples import Dataset
from spinecli.data.splits import hold_out, load_splits
from spinecli.errors import DataError, MissingPathError, OptionError


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {index}", "label": label} for index, label in enumerate(labels)]


def texts(dataset: Dataset) -> list[str]:
    return [example.text for example in dataset.examples]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["validation.jsonl", "test.jsonl"], "validation.jsonl"),
        (["test.jsonl", "dev.jsonl"], "dev.jsonl"),
        (["test.jsonl"], "test.jsonl"),
    ],
)
def test_a_directory_brings_its_evaluation_set(tmp_path: Path, files: list[str], found: str) -> None:
    write_rows(tmp_path / "train.jsonl", rows("no", "yes", "maybe"))
    for file in files:
        write_rows(tmp_path / file, [{"text": file, "label": "yes"}])
    splits = load_splits(str(tmp_path))
    assert texts(splits.train) == ["text 0", "text 1", "text 2"]
    assert texts(splits.evaluation) == [found]
    assert splits.evaluation.labels == splits.train.labels == ("maybe", "no", "yes")
    assert splits.evaluation.examples[0].label == 2


def test_a_named_evaluation_set_comes_first(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", rows(0, 1))
    write_rows(tmp_path / "validation.jsonl", rows(0, 1))
    other = tmp_path / "other.csv"
    other.write_text("text,label\nmine,1\n")
    assert texts(load_splits(str(tmp_path), str(other)).evaluation) == ["mine"]
    with pytest.raises(MissingPathError):
        load_splits(str(tmp_path), str(tmp_path / "absent.csv"))


def test_an_unknown_label_is_told_with_its_row(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", rows("no", "yes"))
    write_rows(tmp_path / "dev.jsonl", rows("no", "perhaps"))
    with pytest.raises(DataError, match=r"dev\.jsonl line 2 has the label 'perhaps'.*its labels are no, yes"):
        load_splits(str(tmp_path))


def test_an_evaluation_set_needs_no_groups_and_no_labels_to_deal_by(tmp_path: Path) -> None:
    train = [{"text": "a", "speaker": "anna", "mood": "sad"}, {"text": "b", "speaker": "emil", "mood": "glad"}]
    write_rows(tmp_path / "train.jsonl", train)
    (tmp_path / "test.txt").write_text("c\n")
    config = ExamplesConfig(task="language", label_column="mood")
    splits = load_splits(str(tmp_path), config=config, group=GroupColumn("speaker"))
    assert [example.label for example in splits.train.examples] == [1, 0]
    assert texts(splits.evaluation) == ["c"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["data.jsonl"], ["train.jsonl", "data.jsonl"]),
        ([], ["train.jsonl", "nothing"]),
        (["train.jsonl", "train.csv"], ["train.jsonl and train.csv"]),
        (["train.jsonl", "dev.csv", "dev.tsv"], ["dev.csv and dev.tsv"]),
    ],
)
def test_an_unclear_directory_is_refused(tmp_path: Path, files: list[str], words: list[str]) -> None:
    for file in files:
        write_rows(tmp_path / file, rows(0, 1))
    with pytest.raises(DataError) as caught:
        load_splits(str(tmp_path))
    assert all(word in str(caught.value) for word in [str(tmp_path), *words]), caught.value


def test_built_in_topics_have_a_validation_split() -> None:
    splits = load_splits("builtin:tiny-topics")
    assert (len(splits.train), len(splits.evaluation)) == (4000, 500)
    assert splits.train.labels == splits.evaluation.labels


def test_a_hub_data_set_brings_its_evaluation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"{split} 0", f"{split} 1"] * 10, "label": [1, 0] * 10})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test", "validation"])
    assert texts(load_splits("somebody/texts").evaluation)[0] == "validation 0"
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
    splits = load_splits("somebody/texts", evaluation_share=0.2)
    assert (len(splits.train), len(splits.evaluation)) == (16, 4)


@given(
    labels=st.lists(st.integers(0, 4), min_size=10, max_size=80),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_held_out_shares_are_of_every_label(labels: list[int], share: float, seed: int) -> None:
    dataset = labelled_set(labels)
    splits = hold_out(dataset, share, seed)
    assert sorted(texts(splits.train) + texts(splits.evaluation)) == sorted(texts(dataset))
    order = {text: index for index, text in enumerate(texts(dataset))}
    for side in (splits.train, splits.evaluation):
        assert texts(side) == sorted(texts(side), key=order.__getitem__)
    for label in set(labels):
        total = labels.count(label)
        held = sum(example.label == label for example in splits.evaluation.examples)
        assert 0 <= held <= max(total - 1, 0)
        if total > 1:
            assert held >= 1
            assert abs(held - share * total) <= 1
    assert hold_out(dataset, share, seed) == splits


def test_held_out_shares_follow_the_seed() -> None:
    dataset = stories([f"story {index}" for index in range(100)])
    assert texts(hold_out(dataset, 0.1, 0).evaluation) != texts(hold_out(dataset, 0.1, 1).evaluation)
    assert len(hold_out(dataset, 0.1, 0).evaluation) == 10


def test_what_cannot_be_held_out_is_refused() -> None:
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(OptionError, match="--evaluation-share"):
            hold_out(stories(["a", "b"]), share, 0)
    with pytest.raises(DataError, match="too few examples"):
        hold_out(stories(["a"]), 0.5, 0)
