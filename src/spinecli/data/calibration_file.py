"""`calibration.safetensors`: the rows that a run calibrated on, kept beside what it wrote."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spinecli.data.rows import Frame, TokenRows
from spinecli.errors import DamagedArtifactError

CALIBRATION_NAME = "calibration.safetensors"
_ABOUT = "calibration"


def save_rows(rows: TokenRows, directory: Path) -> None:
    """Write `calibration.safetensors`."""
    tensors = {"tokens": rows.tokens.to(torch.int32), "kind_of": rows.kind_of.to(torch.int32)}
    about = {"kinds": rows.kinds, "frame": asdict(rows.frame)}
    save_file(tensors, directory / CALIBRATION_NAME, metadata={_ABOUT: json.dumps(about)})


def load_rows(directory: Path, vocabulary: int) -> TokenRows:
    """The rows that the run which wrote `directory` calibrated on.

    Args:
        vocabulary: of the model that they are for.

    Raises: DamagedArtifactError if they are not there, or are not what `save_rows` writes.
    """
    path = directory / CALIBRATION_NAME
    if not path.is_file():
        raise DamagedArtifactError(f"{directory} does not hold the rows that it was calibrated on; prune again.")
    try:
        with safe_open(path, framework="pt") as handle:
            about = json.loads((handle.metadata() or {})[_ABOUT])
            tokens, kind_of = handle.get_tensor("tokens"), handle.get_tensor("kind_of")
        frame = Frame(*(tuple(about["frame"][name]) for name in ("opening", "closing", "names")))
        found = TokenRows(tokens.long(), tuple(about["kinds"]), kind_of.long(), frame)
        wrong = _wrong(found, (tokens.dtype, kind_of.dtype), vocabulary)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedArtifactError(f"{path} is damaged; prune again.") from error
    if wrong:
        raise DamagedArtifactError(f"{path} {wrong}; prune again.")
    return found


def _wrong(found: TokenRows, dtypes: tuple[Any, ...], vocabulary: int) -> str:
    """What cannot be of these rows; empty if nothing."""
    tokens, frame = found.tokens, found.frame
    if set(dtypes) != {torch.int32} or tokens.ndim != 2 or min(tokens.shape, default=0) < 1:
        return "holds no rows of token ids"
    if not all(isinstance(name, str) and name for name in found.kinds) or len(set(found.kinds)) != len(found.kinds):
        return "does not name the kinds of its rows"
    if found.kind_of.shape != tokens.shape[:1] or not _within(found.kind_of, len(found.kinds)):
        return "does not say where its rows come from"
    if not _within(tokens, vocabulary):
        return f"holds token ids that the model's vocabulary of {vocabulary} does not have"
    if frame.size >= found.length:
        return "holds no words beside the special tokens"
    around = torch.cat([tokens[:, : len(frame.opening)], tokens[:, found.length - len(frame.closing) :]], dim=1)
    if not bool((around == torch.tensor([*frame.opening, *frame.closing], dtype=torch.int64)).all()):
        return "holds rows without their special tokens"
    return ""


def _within(values: torch.Tensor, end: int) -> bool:
    return bool(((values >= 0) & (values < end)).all())
