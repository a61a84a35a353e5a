from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spinecli.demo.language import generate
from spinecli.demo.train import START, UNKNOWN, build_tokenizer
from spinecli.demo.vocabulary import END


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(256).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_stories_come_back_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(story.text + "\n" for story in generate(20, 4))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_one_token_for_each_word(tokenizer: PreTrainedTokenizerFast) -> None:
    stories = generate(3, 4)
    tokens = tokenizer.tokenize("".join(story.text + "\n" for story in stories))
    assert tuple(tokens) == sum((story.words for story in stories), ())


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("anna had a key.").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "anna had a key."
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (START, END, UNKNOWN)
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("text", ["Anna,and  a zebra.\n\nat", "anna , and a zebra . \r\n at"])
def test_loose_text_is_read_as_words(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.tokenize(text) == ["anna", ",", "and", "a", UNKNOWN, ".", END, "at"]
