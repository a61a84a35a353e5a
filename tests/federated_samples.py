"""Small data sets and tokenizers that the tests of federated data share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from families import tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spinecli.data.examples import Dataset, Example

_SHARED = Path(__file__).parents[1].parent / "shared"


def shared(*parts: str) -> Path:
    """A real data set or checkpoint; the test is skipped where it is absent."""
    path = _SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip("the real data sets are not here")
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled_set(labels: Sequence[int], groups: Sequence[str] | None = None) -> Dataset:
    """Examples whose text is their own number."""
    examples = tuple(
        Example(f"text {index}", label=label, group=groups[index] if groups else None)
        for index, label in enumerate(labels)
    )
    return Dataset("classification", examples, tuple(str(name) for name in range(max(labels) + 1)), "made")


def stories(texts: Sequence[str], answers: Sequence[str | None] | None = None) -> Dataset:
    answers = answers or [None] * len(texts)
    examples = tuple(Example(text, answer=answer) for text, answer in zip(texts, answers, strict=True))
    return Dataset("language", examples, (), "made")


@cache
def without_padding() -> PreTrainedTokenizerBase:
    """The sample tokenizer without a padding token; its end token is `</s>`, id 2."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def without_special_tokens() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer)


@cache
def encoder_tokenizer() -> PreTrainedTokenizerBase:
    """One that frames texts as BERT's does, over single characters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
