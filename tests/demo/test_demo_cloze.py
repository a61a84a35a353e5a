from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spinecli.demo.cloze import LEAST_RATIO, items
from spinecli.demo.language import next_word_probabilities, split

ASSETS = Path(str(resources.files("spinecli.demo"))) / "assets"


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    lines = (ASSETS / "tasks" / "tiny_cloze.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_file_is_what_the_generator_writes(questions: list[dict[str, Any]]) -> None:
    assert len(questions) == 300
    for item, question in zip(items(40), questions, strict=False):
        assert (item.context, list(item.choices), item.answer) == (
            question["context"],
            question["choices"],
            question["answer"],
        )


def test_the_language_makes_one_choice_clearly_right(questions: list[dict[str, Any]]) -> None:
    for question in questions:
        probabilities = next_word_probabilities(split(question["context"]))
        found = [probabilities.get(choice, 0.0) for choice in question["choices"]]
        right = found.pop(question["answer"])
        assert len(set(question["choices"])) == 4
        assert right > 0.0
        assert right >= LEAST_RATIO * max(found)


def test_the_right_answer_is_at_no_fixed_position(questions: list[dict[str, Any]]) -> None:
    counts = Counter(question["answer"] for question in questions)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 0.35 * len(questions)


def test_the_model_does_far_better_than_chance(questions: list[dict[str, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    right = 0
    for question in questions[:60]:
        with torch.inference_mode():
            logits = model(**tokenizer(question["context"], return_tensors="pt")).logits[0, -1]
        scores = [logits[tokenizer.convert_tokens_to_ids(choice)].item() for choice in question["choices"]]
        right += scores.index(max(scores)) == question["answer"]
    assert right > 36
