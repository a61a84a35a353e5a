"""Bottom and top as one checkpoint in plain Hugging Face form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.finetuned import fine_tuned
from spinecli.checkpoints.masks import Masks
from spinecli.federation.data.encoding import Encoded
from spinecli.federation.deploy import label_settings, verify_answers
from spinecli.federation.evaluation import probe_batch
from spinecli.split.model import Parameters, SplitModel


def write_joined(directory: Path, model: SplitModel, trained: Parameters, labels: Sequence[str]) -> None:
    """Write the checkpoint with what was trained in its place."""
    source = model.checkpoint
    classifies = model.task == "classification"
    settings = label_settings(labels, model.pad_id) if classifies else {}
    task = Task.classification if classifies else Task.causal_lm
    joined = fine_tuned(source, task, model.merged(trained), settings)
    write_cut(directory, joined, Masks.full(source.shapes))


def verify_joined(directory: Path, model: SplitModel, trained: Parameters, probe: Encoded) -> float:
    """Open the checkpoint as a stranger would; the largest difference of its logits from the split model's.

    Raises: VerificationError.
    """
    batch = probe_batch(probe)
    expected, _ = model.joined_answers(trained, batch)
    return verify_answers(directory, batch, expected.detach(), model.task, model.compute)
