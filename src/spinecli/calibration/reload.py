"""What was written, opened again: the last step before a checkpoint is published."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.answers import answer, answering_by_last_token
from spinecli.calibration.observation import masked
from spinecli.calibration.stream import BlockStream, ComputeOptions
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.skeleton import auto_class
from spinecli.errors import VerificationError

PROBE_ROWS = 2
PROBE_LENGTH = 64
TOLERANCE = 1e-4

# Up to this size the whole model is also loaded by transformers itself.
_WHOLE_MODEL_BYTES = 1 << 30


def probe(checkpoint: Checkpoint, rows: Tensor) -> Tensor:
    """The calibration tokens, or their hidden states, on which answers are compared: (rows, length, ...) -> a corner.

    At most 2 rows; of a causal language model their first 64 tokens, of others all, as every token bears on the answer.
    """
    return rows[:PROBE_ROWS, :PROBE_LENGTH] if checkpoint.task is Task.causal_lm else rows[:PROBE_ROWS]


def streamed_logits(
    checkpoint: Checkpoint,
    tokens: Tensor,
    masks: Masks | None = None,
    compute: ComputeOptions | None = None,
    stopwatch: Stopwatch | None = None,
) -> Tensor:
    """Answers of a checkpoint to tokens (rows, length); their shape is that of `BlockStream.logits`.

    Args:
        masks: units whose outputs are set to zero, and blocks that are skipped.
    """
    stream = BlockStream(checkpoint, tokens.shape[1], compute, stopwatch)
    hidden = stream.embed(tokens)
    for index in range(stream.blocks):
        mask = masks.blocks[index] if masks else None
        if mask is not None and not mask.kept:
            continue
        with stream.block(index) as block:
            if mask is None:
                hidden = stream.run(block, hidden)
            else:
                with masked(block, checkpoint.family, checkpoint.shapes[index], mask):
                    hidden = stream.run(block, hidden)
    return torch.cat(list(stream.logits(hidden))).cpu()


def verify_written(
    directory: Path, tokens: Tensor, expected: Tensor, compute: ComputeOptions, stopwatch: Stopwatch
) -> float:
    """Open the checkpoint in `directory` as a stranger would and compare its logits; returns the largest difference.

    Every tensor must be where the configuration says, with its shape. Models up to 1 GiB are also loaded whole by
    transformers, which must find nothing missing, unexpected or re-initialised.

    Args:
        expected: what `tokens` must give, in the shape of `BlockStream.logits`.

    Raises: VerificationError; the checkpoint must not be published.
    """
    checkpoint = Checkpoint.open(directory)
    found = [streamed_logits(checkpoint, tokens, compute=compute, stopwatch=stopwatch)]
    if checkpoint.bytes <= _WHOLE_MODEL_BYTES:
        found.append(_whole_model_logits(checkpoint, tokens, compute))
    scale = max(1.0, float(expected.abs().max()))
    difference = max(float((logits - expected).abs().max()) for logits in found)
    tolerance = TOLERANCE * scale if compute.dtype is torch.float32 else 0.05 * scale
    if not difference <= tolerance:
        raise VerificationError(
            f"The written checkpoint's logits differ from the intended ones by {difference:.2e}; nothing was published."
        )
    return difference


@torch.no_grad()
def _whole_model_logits(checkpoint: Checkpoint, tokens: Tensor, compute: ComputeOptions) -> Tensor:
    transformers_logging.disable_progress_bar()
    model, info = auto_class(checkpoint.task).from_pretrained(
        checkpoint.path, dtype=compute.dtype, output_loading_info=True, trust_remote_code=False, local_files_only=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise VerificationError(
                f"transformers reports {problem.replace('_', ' ')} {sorted(info[problem])[:3]}; nothing was published."
            )
    model = answering_by_last_token(model.to(compute.device).eval())
    rows = torch.split(tokens.to(compute.device), 1)
    return torch.cat([answer(model(row, use_cache=False)) for row in rows]).cpu()
