"""What a class of devices runs after the rounds: its pruned checkpoint with the adapter merged, in plain form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from spinecli.checkpoints.checkpoint import Checkpoint, fine_tuned
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.skeleton import auto_class
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.data import config as data_config
from spinecli.data.batches import IGNORED, Batch
from spinecli.data.encoding import Encoded
from spinecli.errors import VerificationError
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.training import answers_of
from spinecli.federation.evaluation import adapter_for, probe_batch
from spinecli.federation.strategies.strategy import DeployedModel, GlobalModel

_TOLERANCE = 1e-3
_COARSE_TOLERANCE = 0.05
"""For checkpoints stored in half precision, to which the merged weights are rounded."""


def merged_checkpoint(base: BaseModel, model: GlobalModel, labels: Sequence[str], pad_id: int) -> Checkpoint:
    """The uncut checkpoint with the adapter added to its weights and the trained head in place."""
    source = base.checkpoint
    classifies = base.task == "classification"
    prefix = base.family.blocks.removesuffix(source.blocks_path)
    values: dict[str, Tensor] = dict(model.head)
    for name, factors in model.adapter.items():
        stored = source.read(f"{name.removeprefix(prefix)}.weight")
        values[f"{name}.weight"] = stored.float() + factors.product()
    settings: dict[str, Any] = {}
    if classifies:
        settings = label_settings(labels, pad_id)
    return fine_tuned(source, Task.classification if classifies else Task.causal_lm, values, settings)


def label_settings(labels: Sequence[str], pad_id: int) -> dict[str, Any]:
    """Keys of a classifier's config.json."""
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "pad_token_id": pad_id,
    }


def deploy(directory: Path, merged: Checkpoint, served: DeployedModel) -> None:
    """Write the checkpoint of one group: `merged`, cut by the group's masks."""
    directory.mkdir(parents=True, exist_ok=True)  # a killed run may have begun it
    write_cut(directory, merged, served.masks or Masks.full(merged.shapes))


@torch.no_grad()
def verify_deployed(
    directory: Path, base: BaseModel, model: GlobalModel, served: DeployedModel, probe: Encoded
) -> float:
    """Open a written checkpoint as a stranger would; the largest difference of its logits from the trained model's.

    Raises: VerificationError.
    """
    batch = probe_batch(probe)
    with base.lent(model.head, served.masks):
        base.attach(adapter_for(base, model, served), trainable=False)
        expected, _ = answers_of(base, batch)
    return verify_answers(directory, batch, expected, base.task, base.compute)


@torch.no_grad()
def verify_answers(
    directory: Path, batch: Batch, expected: Tensor, task: data_config.Task, compute: ComputeOptions
) -> float:
    """Open the checkpoint in `directory` with plain transformers; how far its logits are from those expected.

    Args:
        expected: logits, one row an answer.

    Raises: VerificationError.
    """
    transformers_logging.disable_progress_bar()
    checkpoint = Checkpoint.open(directory)
    written, info = auto_class(checkpoint.task).from_pretrained(
        directory, dtype=compute.dtype, output_loading_info=True, trust_remote_code=False, local_files_only=True
    )
    if absent := sorted({*info["missing_keys"], *info["mismatched_keys"]}):
        raise VerificationError(f"{directory} lacks {absent[0]}; nothing was published.")
    inputs = {name: value.to(compute.device) for name, value in batch.model_inputs().items()}
    logits = written.to(compute.device).eval()(**inputs).logits.float()
    found = logits if task == "classification" else logits[:, :-1][batch.labels[:, 1:] != IGNORED]
    if not bool(torch.isfinite(found).all()):
        raise VerificationError(
            f"The checkpoint in {directory} gives no finite numbers, while the trained model does: trained weights are "
            f"beyond what its {checkpoint.storage_dtype} holds; nothing was published, so train from a checkpoint in "
            "float32 or with a lower --learning-rate."
        )
    difference = float((found - expected).abs().max())
    precise = checkpoint.storage_dtype is torch.float32 and compute.dtype is torch.float32
    tolerance = (_TOLERANCE if precise else _COARSE_TOLERANCE) * max(1.0, float(expected.abs().max()))
    if not difference <= tolerance:
        raise VerificationError(
            f"The checkpoint in {directory} answers differently from the trained model by {difference:.2e}; "
            "nothing was published."
        )
    return difference
