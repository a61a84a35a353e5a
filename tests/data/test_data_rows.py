from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from families import POSITIONS, VOCABULARY, Recipe, recipe, sample_text, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spinecli.artifacts.manifest import Source
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.tokenizer import fitting_tokenizer, load_tokenizer, tokenizer_of
from spinecli.data.calibration import open_calibration
from spinecli.data.config import CalibrationConfig
from spinecli.data.rows import Frame, token_rows, tokens_source
from spinecli.data.text import Text
from spinecli.errors import CalibrationTextError, MissingPackageError, OptionError, TokenizerError

MODEL = Source(reference="some/model", files={})


def text(content: str) -> Text:
    return Text("some.txt", "a text", (content,))


@cache
def without_words() -> PreTrainedTokenizerFast:
    """As Llama 2 does it: merges over the whole text, spaces made visible, no splitting into words."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = [sample_text()[start : start + 60] for start in range(0, 6000, 60)]
    made.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


TOKENIZERS = {"byte-level": tokenizer, "without words": without_words}
WORDISH = st.one_of(
    st.sampled_from(sample_text().split()[:200]),
    st.text(" \n", min_size=1, max_size=30),
    st.text("ab", min_size=1, max_size=60),
    st.text(min_size=1, max_size=8).filter(lambda piece: "\ud800" not in piece),
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100)
@given(data=st.data())
def test_rows_are_the_first_tokens_of_the_whole_text(kind: str, data: st.DataObject) -> None:
    """Only a prefix of the text is tokenised; the cut through it must not show."""
    made = TOKENIZERS[kind]()
    pieces = data.draw(st.lists(WORDISH, min_size=20, max_size=60), label="pieces")
    content = data.draw(st.sampled_from([" ", ""]), label="between").join(pieces) * data.draw(st.integers(1, 6))
    length = data.draw(st.integers(2, 20), label="length")
    rows = data.draw(st.integers(1, 6), label="rows")
    whole = made(content, add_special_tokens=False)["input_ids"]
    if len(whole) < length:
        return
    found = token_rows(made, text(content), rows, length)
    count = min(rows, len(whole) // length)
    assert found.tokens.flatten().tolist() == whole[: count * length]
    assert (found.rows, found.length) == (count, length)


@given(lengths=st.lists(st.integers(3, 7), min_size=30, max_size=60), wanted=st.integers(2, 25))
def test_the_cut_through_the_text_does_not_show(lengths: list[int], wanted: int) -> None:
    """At about six characters a token, the first guess of a prefix ends right behind the wanted tokens."""
    words = {"w" * length: length for length in range(3, 8)}
    made = Tokenizer(models.WordLevel({"<unk>": 0, **words}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    content = " ".join("w" * length for length in lengths)
    found = token_rows(wrapped, text(content), 1, wanted)
    assert found.tokens.flatten().tolist() == lengths[:wanted]


def test_long_texts_are_not_tokenised_whole() -> None:
    seen: list[int] = []

    class Counting:
        def __call__(self, content: str, **options: object) -> object:
            seen.append(len(content))
            return tokenizer()(content, **options)

    content = sample_text() * 20
    found = token_rows(Counting(), text(content), 2, 16)  # type: ignore[arg-type]
    assert max(seen) < len(content) / 100
    assert found.tokens.flatten().tolist() == tokenizer()(content[:2000])["input_ids"][:32]


def test_few_tokens_per_character_still_fill_the_rows() -> None:
    """A tokenizer that makes one token of a long word needs a longer prefix than the first guess."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "w" * 50: 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    found = token_rows(wrapped, text(" ".join(["w" * 50] * 200)), 10, 10)
    assert found.rows == 10
    assert found.tokens.eq(1).all()


def test_short_texts_give_fewer_rows_and_too_short_ones_an_error() -> None:
    ten = sample_text()[:60]
    available = len(tokenizer()(ten)["input_ids"])
    found = token_rows(tokenizer(), text(ten), 100, 4)
    assert found.rows == available // 4
    with pytest.raises(CalibrationTextError, match=rf"some.txt has {available} tokens, fewer than one row of 500"):
        token_rows(tokenizer(), text(ten), 1, 500)


@pytest.mark.parametrize(("rows", "length"), [(0, 8), (-1, 8), (1, 1), (1, 0)])
def test_impossible_sizes(rows: int, length: int) -> None:
    with pytest.raises(OptionError, match="Rows must be"):
        token_rows(tokenizer(), text(sample_text()), rows, length)


def begin_and_end_texts(directory: Path) -> None:
    """Let the tokenizer of a checkpoint put its special tokens around a text."""
    found = load_tokenizer(directory)
    found.cls_token, found.sep_token = "<s>", "</s>"
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    found.save_pretrained(directory)


def test_no_special_tokens() -> None:
    assert token_rows(tokenizer(), text(sample_text()), 4, 16).tokens.min() > 2


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoders_rows_are_framed_by_its_special_tokens(
    written: Callable[[Recipe], Path], tmp_path: Path, sample_file: Path, family: str
) -> None:
    directory = shutil.copytree(written(recipe(family)), tmp_path / "copy")
    options = CalibrationConfig(text=str(sample_file), rows=3, length=16)
    plain = open_calibration(Checkpoint.open(directory), MODEL, options).read().tokens
    assert plain.tolist() == token_rows(tokenizer(), text(sample_text()), 3, 16).tokens.tolist()
    begin_and_end_texts(directory)
    found = open_calibration(Checkpoint.open(directory), MODEL, options).read().tokens
    assert found.shape == (3, 16)
    assert (found[:, 0].tolist(), found[:, -1].tolist()) == ([1] * 3, [2] * 3)
    assert found[:, 1:-1].flatten().tolist() == plain.flatten().tolist()[: 3 * 14]
    with pytest.raises(OptionError, match="no room"):
        open_calibration(Checkpoint.open(directory), MODEL, CalibrationConfig(text=str(sample_file), rows=3, length=2))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(TokenizerError, match="another model"):
        token_rows(tokenizer(), text(sample_text()), 4, 16, vocabulary=20)


def test_identity_is_the_tokens_and_not_the_file_name() -> None:
    one = token_rows(tokenizer(), text(sample_text()), 2, 8).tokens
    same = token_rows(tokenizer(), Text("other.txt", "", (sample_text() + " more",)), 2, 8).tokens
    fewer = token_rows(tokenizer(), text(sample_text()), 1, 8).tokens
    digests = [tokens_source(name, tokens).digest for name, tokens in (("x", one), ("y", same), ("x", fewer))]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("damage", ["absent", "empty", "garbage"])
def test_unreadable_tokenizers(written: Callable[[Recipe], Path], tmp_path: Path, damage: str) -> None:
    directory = shutil.copytree(written(recipe("llama")), tmp_path / "copy")
    for file in directory.glob("tokenizer*"):
        if damage == "absent":
            file.unlink()
        else:
            file.write_text("" if damage == "empty" else '{"version": "1.0", "model": {"type": "Nothing"}}')
    with pytest.raises(TokenizerError, match=str(directory)):
        load_tokenizer(directory)


def test_calibration_rows_of_a_checkpoint(opened: Callable[[Recipe], Checkpoint], sample_file: Path) -> None:
    checkpoint = opened(recipe("qwen2"))
    options = CalibrationConfig(text=str(sample_file), rows=3, length=16)
    found = open_calibration(checkpoint, MODEL, options).read()
    assert found.tokens.shape == (3, 16)
    assert found.tokens.dtype is torch.int64
    assert int(found.tokens.max()) < VOCABULARY
    expected = tokenizer()(sample_text(), add_special_tokens=False)["input_ids"][:48]
    assert found.tokens.flatten().tolist() == expected


def test_rows_longer_than_the_model_can_read(opened: Callable[[Recipe], Checkpoint]) -> None:
    with pytest.raises(OptionError, match=f"exceeds the model's {POSITIONS} positions"):
        open_calibration(opened(recipe("opt")), MODEL, CalibrationConfig(rows=1, length=POSITIONS + 1))


def changed_tokenizer(directory: Path, **settings: object) -> Path:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return directory


@pytest.mark.parametrize("token", ["pad_token", "bos_token", "eos_token"])
def test_a_special_token_without_a_row_in_the_embedding_is_refused(
    written: Callable[[Recipe], Path], tmp_path: Path, token: str
) -> None:
    directory = shutil.copytree(written(recipe("llama")), tmp_path / "copy")
    changed_tokenizer(directory, **{token: "[NEW]"})
    with pytest.raises(TokenizerError, match=rf"tokenizer_config.json has the {token} '\[NEW\]', number 320"):
        tokenizer_of(Checkpoint.open(directory))


def test_added_tokens_without_a_row_are_named_and_words_without_one_are_refused(
    written: Callable[[Recipe], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma's tokenizer knows a token for images that its text models have no row for."""
    directory = shutil.copytree(written(recipe("llama")), tmp_path / "copy")
    made = load_tokenizer(directory)
    made.add_tokens(["<image>"])
    made.save_pretrained(directory)
    tokenizer_of(Checkpoint.open(directory))
    assert "knows <image>, for which the embedding has no row" in caplog.text
    with pytest.raises(TokenizerError, match="another model"):
        fitting_tokenizer(directory, 300)


def test_a_tokenizer_with_far_fewer_tokens_than_rows_is_noted(
    written: Callable[[Recipe], Path], caplog: pytest.LogCaptureFixture
) -> None:
    fitting_tokenizer(written(recipe("llama")), 512)
    assert "has 320 tokens and the embedding 512 rows" in caplog.text


@pytest.mark.parametrize(("file", "package"), [("tokenizer.model", "sentencepiece"), ("own.tiktoken", "tiktoken")])
def test_a_package_that_a_tokenizer_needs_is_named(tmp_path: Path, file: str, package: str) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    (tmp_path / file).write_bytes(b"pieces")
    with pytest.raises(MissingPackageError, match=f"install it with: pip install {package}"):
        load_tokenizer(tmp_path)


def test_a_text_that_carries_its_own_beginning_begins_once() -> None:
    frame = Frame((1,), (), ("<s>",))
    begun = token_rows(tokenizer(), text("<s>" + sample_text()), 2, 16, frame=frame)
    assert torch.equal(begun.tokens, token_rows(tokenizer(), text(sample_text()), 2, 16, frame=frame).tokens)
    assert (begun.tokens[:, 0].tolist(), (begun.tokens == 1).sum()) == ([1, 1], 2)
