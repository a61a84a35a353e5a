"""The checkpoints that pruning is measured on, with the texts that belong to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"


@dataclass(frozen=True)
class Setting:
    """A checkpoint with its texts."""

    name: str
    model: str
    calibration: str
    evaluation: str
    length: int
    """Tokens of an evaluation row."""


def settings(names: list[str]) -> Iterator[Setting]:
    """The settings whose files are there."""
    for name, kind in (("english-7M", "english"), ("stories260K", "stories")):
        model, texts = SHARED / "models" / name, SHARED / "texts"
        if name in names and model.is_dir():
            calibration, evaluation = texts / f"{kind}-calibration.txt", texts / f"{kind}-evaluation.txt"
            yield Setting(name, str(model), str(calibration), str(evaluation), 256)
    if "tiny" in names:
        yield Setting("tiny", "builtin:tiny", "builtin:tiny-calibration", "builtin:tiny-evaluation", 128)
