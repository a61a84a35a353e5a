"""Random classifiers of a few thousand weights, and labelled sentences in their words."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from families import ENCODERS, WORDS, classifier
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

NAMES = ("ash", "birch", "cedar")


def write_classifier(
    directory: Path, family: str = "llama", *, names: Sequence[str] | None = NAMES, padding: bool = True, seed: int = 0
) -> Path:
    """A classifier with three outputs; None leaves them unnamed."""
    classifier(family, grouped=family == "llama", seed=seed).write(directory)
    change_config(directory, names=names)
    if not padding:
        change_config(directory, names=names, pad_token_id=None)
    return directory


def change_config(directory: Path, names: Sequence[str] | None = None, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    if names is not None:
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}
    (directory / "config.json").write_text(json.dumps({**config, **values}))


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 3 to 20 words with a label by chance."""
    chosen = random.Random(seed)
    return [(" ".join(chosen.choices(WORDS, k=chosen.randint(3, 20))), chosen.choice(NAMES)) for _ in range(count)]


def write_sentences(path: Path, rows: Sequence[tuple[str, ...]], header: Sequence[str] = ("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@torch.no_grad()
def plain_loop(
    directory: Path, rows: Sequence[tuple[str, ...]], max_length: int, model: nn.Module | None = None
) -> tuple[float, float]:
    """Accuracy and mean loss with nothing but transformers: one row at a time, so that nothing is padded."""
    model = model or AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    segmented = model.config.model_type in ENCODERS
    losses, right = [], 0
    for *texts, label in rows:
        inputs = tokenizer(
            *texts, truncation=True, max_length=max_length, return_tensors="pt", return_token_type_ids=segmented
        )
        target = NAMES.index(label)
        logits = model.eval()(**inputs).logits
        losses.append(float(nn.functional.cross_entropy(logits, torch.tensor([target]))))
        right += int(logits.argmax()) == target
    return right / len(rows), sum(losses) / len(losses)
