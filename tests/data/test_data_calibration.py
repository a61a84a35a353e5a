from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversing import chat_tokenizer
from families import VOCABULARY, Recipe, classifier, recipe, sample_text
from safetensors.torch import load_file, save_file

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.manifest import Source
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import describe_source
from spinecli.checkpoints.stream import whole_model as loading
from spinecli.data import author, writing
from spinecli.data.calibration import Calibration, default_words, open_calibration
from spinecli.data.calibration_file import CALIBRATION_NAME, load_rows, save_rows
from spinecli.data.config import CalibrationConfig
from spinecli.data.rows import Frame, TokenRows
from spinecli.errors import CalibrationTextError, CannotWriteError, DamagedArtifactError, MissingPathError, OptionError

Opened = Callable[[Recipe], Checkpoint]
MODEL = Source(reference="some/model", files={})
LLAMA = recipe("llama")


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files in the current directory: long, short, and too short for a row."""
    monkeypatch.chdir(tmp_path)
    words = sample_text()
    for name, size in (("long.txt", 20_000), ("short.txt", 160), ("tiny.txt", 10)):
        (tmp_path / name).write_text(words[:size])
    return tmp_path


def opened_of(checkpoint: Checkpoint, *words: str, rows: int = 16, seed: int = 0, **changes: Any) -> Calibration:
    options = CalibrationConfig(text=words or None, rows=rows, length=16, **changes)
    return open_calibration(checkpoint, describe_source("some/model", checkpoint.path), options, seed=seed)


def test_rows_are_dealt_by_weight_and_know_where_they_come_from(opened: Opened, texts: Path) -> None:
    (texts / "other.txt").write_text("".join(reversed(sample_text()[:20_000])))
    found = opened_of(opened(LLAMA), "long.txt", "other.txt:0.5").read()
    assert found.kinds == ("long.txt", "other.txt")
    assert found.rows_by_kind == {"long.txt": 11, "other.txt": 5}
    assert found.kind_of[:6].tolist().count(1) == 2
    for number, name in enumerate(found.kinds):
        alone = opened_of(opened(LLAMA), name).read().tokens
        mine = found.tokens[found.kind_of == number]
        assert torch.equal(mine, alone[: len(mine)])


def test_one_text_gives_the_rows_and_the_sum_that_it_always_gave(opened: Opened, texts: Path) -> None:
    found = opened_of(opened(LLAMA), "long.txt")
    assert list(found.source().files) == ["token ids"]
    assert found.source().reference == "long.txt"
    assert opened_of(opened(LLAMA), "long.txt:7").source().digest == found.source().digest


def test_a_short_text_gives_what_it_has_and_the_others_fill_up(
    opened: Opened, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = opened_of(opened(LLAMA), "long.txt", "short.txt")
    has = found.read().rows_by_kind["short.txt"]
    assert 0 < has < 8
    assert found.read().rows_by_kind["long.txt"] == 16 - has
    assert f"Of 16 calibration rows only {has} from short.txt" in caplog.text
    assert len(caplog.records) == 1
    half = found.kind_of[:8].tolist().count(1)
    assert abs(half - has / 2) <= 1


def test_a_text_without_a_whole_row_is_left_out(opened: Opened, texts: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = opened_of(opened(LLAMA), "tiny.txt", "long.txt")
    assert (found.kinds, found.rows) == (("long.txt",), 16)
    assert "only 0 from tiny.txt" in caplog.text
    assert found.kind_of.unique().tolist() == [0]


def test_nothing_at_all_is_an_error(opened: Opened, texts: Path) -> None:
    shutil.copy(texts / "tiny.txt", texts / "more.txt")
    with pytest.raises(CalibrationTextError, match="fewer than one row"):
        opened_of(opened(LLAMA), "tiny.txt", "more.txt")
    with pytest.raises(MissingPathError, match=r"absent\.txt"):
        opened_of(opened(LLAMA), "long.txt", "absent.txt:0.1")


def test_who_calibrates_on_what_by_default(opened: Opened) -> None:
    assert default_words(opened(LLAMA), "builtin:tiny") == ("builtin:tiny-calibration",)
    assert default_words(opened(LLAMA), "some/model") == ("self",)
    for other in (recipe("bert"), classifier("llama", grouped=True)):
        assert default_words(opened(other), "some/model") == ("builtin:python-docs",)
    assert opened_of(opened(LLAMA)).kinds == ("self",)


@pytest.mark.parametrize("made", [recipe("bert"), classifier("gpt2")])
def test_only_language_models_write(opened: Opened, made: Recipe) -> None:
    with pytest.raises(CannotWriteError, match=r"some/model is made for .* and writes no text.*--calibration"):
        opened_of(opened(made), "self")


def test_opening_writes_nothing_and_reading_does(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    monkeypatch.setattr(author, "whole_model", lambda *given: loads.append(given) or loading.whole_model(*given))
    found = opened_of(opened(LLAMA), "self", rows=6)
    assert (found.rows, found.length, found.source().files.keys()) == (6, 16, {"self"})
    assert (found.stand_in().tokens.shape, loads) == ((6, 16), [])
    rows = found.read()
    assert len(loads) == 1
    assert int(rows.tokens.max()) < VOCABULARY
    settled = found.settled(rows)
    assert settled.read() is rows
    assert settled.source() == found.source()
    assert len(loads) == 1


def test_the_same_seed_writes_the_same_and_the_sum_knows_it(opened: Opened) -> None:
    one, same, other = (opened_of(opened(LLAMA), "self", rows=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.read().tokens, same.read().tokens)
    assert not torch.equal(one.read().tokens, other.read().tokens)
    assert one.source().digest == same.source().digest != other.source().digest
    for changed in (
        opened_of(opened(replace(LLAMA, seed=9)), "self", rows=4, seed=1),
        opened_of(opened(LLAMA), rows=5),
    ):
        assert changed.source().digest != one.source().digest


def test_batches_do_not_change_what_is_written(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened_of(opened(LLAMA), "self", rows=7).read().tokens
    monkeypatch.setattr(author, "_BATCH", 3)
    assert torch.equal(opened_of(opened(LLAMA), "self", rows=7).read().tokens, whole)
    monkeypatch.setattr(author, "_CACHE_BYTES", 1)
    assert torch.equal(opened_of(opened(LLAMA), "self", rows=7).read().tokens, whole)


def test_what_was_written_before_a_kill_is_not_written_again(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(author, "_BATCH", 2)
    found = opened_of(opened(LLAMA), "self", rows=6)
    whole = found.read().tokens

    def killed(phase: str, done: int, total: int) -> None:
        assert (phase, total) == ("writing text", 3 * 16)
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found.read(RunContext(state=tmp_path, progress=killed))
    seen: list[int] = []
    again = RunContext(state=tmp_path, progress=lambda phase, done, total: seen.append(done))
    assert torch.equal(found.read(again).tokens, whole)
    assert (seen[0], seen[-1]) == (17, 48)
    seen.clear()
    assert torch.equal(found.read(again).tokens, whole)
    assert seen == []


def test_a_large_model_says_what_writing_costs_before_it_writes(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = opened_of(opened(LLAMA), "self", rows=3).read().tokens
    monkeypatch.setattr(loading, "WHOLE_MODEL_BYTES", 0)
    told: list[object] = []
    found = opened_of(opened(LLAMA), "self", rows=3)
    assert torch.equal(found.read(RunContext(note=told.append)).tokens, whole)
    assert len(told) == 1
    assert "in each of 15 steps" in str(told[0])


def test_every_fourth_row_is_a_conversation_if_there_is_a_template(
    written: Callable[[Recipe], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = shutil.copytree(written(LLAMA), tmp_path / "chatting")
    made = chat_tokenizer()
    made.save_pretrained(directory)
    options = CalibrationConfig(text=("self",), rows=8, length=64)
    rows = open_calibration(Checkpoint.open(directory), MODEL, options).read()
    shown = [made.decode(row) for row in rows.tokens]
    assert [text.startswith("<s><user>") for text in shown] == [False, False, False, True] * 2
    assert all("<assistant>" in text for text in shown[3::4])
    short = CalibrationConfig(text=("self",), rows=6, length=12)
    assert open_calibration(Checkpoint.open(directory), MODEL, short).author.form.chat is None  # type: ignore[union-attr]
    assert "no conversations, because the chat template takes" in caplog.text


def test_documents_begin_with_an_ordinary_token(opened: Opened) -> None:
    found = opened_of(opened(LLAMA), "self")
    assert found.author
    assert min(found.author.form.words) > 2
    assert found.author.form.ends == {2}


ROWS = TokenRows(
    torch.tensor([[1, 5, 6], [1, 7, 8], [1, 9, 9]]),
    ("a.txt", "self"),
    torch.tensor([0, 1, 0]),
    Frame((1,), (), ("<s>",)),
)


def test_rows_are_kept_as_they_are(tmp_path: Path) -> None:
    save_rows(ROWS, tmp_path)
    found = load_rows(tmp_path, 10)
    assert load_file(tmp_path / CALIBRATION_NAME)["tokens"].dtype is torch.int32
    assert torch.equal(found.tokens, ROWS.tokens)
    assert torch.equal(found.kind_of, ROWS.kind_of)
    assert (found.kinds, found.frame) == (ROWS.kinds, ROWS.frame)


def test_the_first_rows_keep_their_frame() -> None:
    framed = TokenRows(
        torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]]), ("a",), torch.tensor([0, 0]), Frame((1,), (2,), ("<s>", "</s>"))
    )
    assert framed.first(1, 3).tokens.tolist() == [[1, 5, 2]]
    assert framed.first(2, 4).tokens.tolist() == framed.tokens.tolist()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": torch.tensor([[1, 5, 10]] * 3, dtype=torch.int32)}, "vocabulary of 10"),
        ({"tokens": torch.tensor([[1, 5, -1]] * 3, dtype=torch.int32)}, "vocabulary of 10"),
        ({"tokens": torch.tensor([[1, 5, 6]] * 3)}, "no rows of token ids"),
        ({"tokens": torch.zeros(3, dtype=torch.int32)}, "no rows of token ids"),
        ({"tokens": torch.zeros(0, 3, dtype=torch.int32)}, "no rows of token ids"),
        ({"tokens": torch.tensor([[4, 5, 6]] * 3, dtype=torch.int32)}, "without their special tokens"),
        ({"kind_of": torch.tensor([0, 1], dtype=torch.int32)}, "where its rows come from"),
        ({"kind_of": torch.tensor([0, 1, 2], dtype=torch.int32)}, "where its rows come from"),
        ({"about": {"kinds": ["a", "a"]}}, "kinds of its rows"),
        ({"about": {"kinds": [3, "a"]}}, "kinds of its rows"),
        ({"about": {"frame": {"opening": [1, 5, 6], "closing": [], "names": []}}}, "no words"),
        ({"about": {"frame": 3}}, "damaged"),
        ({"about": None}, "damaged"),
        ({"kind_of": None}, "damaged"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    tensors = {"tokens": ROWS.tokens.int(), "kind_of": ROWS.kind_of.int()} | change
    about = {"kinds": ROWS.kinds, "frame": {"opening": [1], "closing": [], "names": ["<s>"]}}
    extra = tensors.pop("about", {})
    metadata = None if extra is None else {"calibration": json.dumps(about | extra)}
    save_file(
        {name: value for name, value in tensors.items() if value is not None}, tmp_path / CALIBRATION_NAME, metadata
    )
    with pytest.raises(DamagedArtifactError, match=f"{told}.*; prune again"):
        load_rows(tmp_path, 10)


def test_rows_that_are_absent_or_no_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedArtifactError, match=r"does not hold the rows.*; prune again"):
        load_rows(tmp_path, 10)
    (tmp_path / CALIBRATION_NAME).write_bytes(b"garbage")
    with pytest.raises(DamagedArtifactError, match="is damaged; prune again"):
        load_rows(tmp_path, 10)


def test_the_rule_is_part_of_the_sum(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened_of(opened(LLAMA), "self")
    before = found.source().digest
    monkeypatch.setattr(author, "RULE", writing.RULE + 1)
    assert found.source().digest != before


def test_a_wrong_word_is_told_by_the_option(opened: Opened) -> None:
    with pytest.raises(OptionError, match="--calibration self:-1"):
        opened_of(opened(LLAMA), "self:-1")
