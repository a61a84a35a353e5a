"""Is it what transformers computes? Asked of a checkpoint before it is worked on, and of one that was written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.stream.block_stream import BlockStream, ComputeOptions, answer, answering_by_last_token
from spinecli.checkpoints.stream.observation import masked
from spinecli.checkpoints.stream.whole_model import stays_on_disk, whole_model
from spinecli.errors import VerificationError

PROBE_ROWS = 2
PROBE_LENGTH = 64
TOLERANCE = 1e-4
MEAN_TOLERANCE = 2e-4
_RANDOM_LENGTH = 32


def probe(checkpoint: Checkpoint, rows: Tensor) -> Tensor:
    """The calibration tokens, or their hidden states, on which answers are compared: (rows, length, ...) -> a corner.

    At most 2 rows; of a causal language model their first 64 tokens, of others all, as every token bears on the answer.
    """
    return rows[:PROBE_ROWS, :PROBE_LENGTH] if checkpoint.task is Task.causal_lm else rows[:PROBE_ROWS]


def random_rows(checkpoint: Checkpoint) -> Tensor:
    """Tokens to compare answers on where no text is at hand, always the same: (2, 32) int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(int(checkpoint.config.vocab_size), (PROBE_ROWS, _RANDOM_LENGTH), generator=generator)


def streamed_logits(
    checkpoint: Checkpoint,
    tokens: Tensor,
    masks: Masks | None = None,
    compute: ComputeOptions | None = None,
    context: RunContext | None = None,
) -> Tensor:
    """Answers of a checkpoint to tokens (rows, length); their shape is that of `BlockStream.logits`.

    Args:
        masks: units whose outputs are set to zero, and blocks that are skipped.
    """
    stream = BlockStream(checkpoint, tokens.shape[1], compute, context)
    if masks is None:
        hidden = stream.forward(tokens)
    else:
        hidden = stream.embed(tokens)
        for block in stream.loaded_blocks(masks.kept_blocks):
            with masked(block, checkpoint.family, checkpoint.shapes[block.index], masks.blocks[block.index]):
                hidden = stream.run(block, hidden)
    return torch.cat(list(stream.logits(hidden))).cpu()


def verify_reading(
    checkpoint: Checkpoint, tokens: Tensor, compute: ComputeOptions | None = None, context: RunContext | None = None
) -> None:
    """Compare the block stream of a checkpoint with the model that transformers itself loads from its directory.

    Args:
        tokens: (rows, length); see `probe`.

    Raises: VerificationError.
    """
    compute = compute or ComputeOptions()
    found = streamed_logits(checkpoint, tokens, None, compute, context)
    expected, _ = _whole_model_logits(checkpoint, tokens, compute)
    difference = float((found - expected).abs().max())
    if not _agree(found, expected, compute):
        raise VerificationError(
            f"spine reads {checkpoint.path} differently from transformers: logits differ by {difference:.2e}. "
            "Nothing was written; please report which checkpoint it is."
        )


def _agree(found: Tensor, expected: Tensor, compute: ComputeOptions) -> bool:
    """Whether answers differ by rounding at most.

    By their largest difference, or, as a cut model that has lost its balance amplifies rounding at single tokens, by
    the mean square of all differences: a wrong weight is seen in every one of them.
    """
    tolerance, mean = (TOLERANCE, MEAN_TOLERANCE) if compute.dtype is torch.float32 else (0.05, 0.05)
    difference = (found - expected).abs()
    if float(difference.max()) <= tolerance * max(1.0, float(expected.abs().max())):
        return True
    root = torch.linalg.vector_norm
    return bool(root(difference, dtype=torch.float64) <= mean * root(expected, dtype=torch.float64))


def verify_written(
    directory: Path, tokens: Tensor, expected: Tensor, compute: ComputeOptions, context: RunContext | None = None
) -> float:
    """Open the checkpoint in `directory` as a stranger would and compare its logits; returns the largest difference.

    Every tensor must be where the configuration says, with its shape. Models up to 1 GiB are also loaded whole by
    transformers, which must find nothing missing, unexpected or re-initialised.

    Args:
        expected: what `tokens` must give, in the shape of `BlockStream.logits`.

    Raises: VerificationError; the checkpoint must not be published.
    """
    checkpoint = Checkpoint.open(directory)
    found = [streamed_logits(checkpoint, tokens, compute=compute, context=context)]
    if not stays_on_disk(checkpoint):
        logits, info = _whole_model_logits(checkpoint, tokens, compute)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise VerificationError(
                    f"transformers reports {problem.replace('_', ' ')} {sorted(info[problem])[:3]}; nothing was "
                    "published."
                )
        found.append(logits)
    difference = max(float((logits - expected).abs().max()) for logits in found)
    if not all(_agree(logits, expected, compute) for logits in found):
        raise VerificationError(
            f"The written checkpoint's logits differ from the intended ones by {difference:.2e}; nothing was published."
        )
    return difference


@torch.no_grad()
def _whole_model_logits(
    checkpoint: Checkpoint, tokens: Tensor, compute: ComputeOptions
) -> tuple[Tensor, dict[str, set[str]]]:
    """Answers of the model that transformers loads from the checkpoint's directory, and what it reports of loading."""
    loaded, info = whole_model(checkpoint, compute)
    model = answering_by_last_token(loaded)
    rows = torch.split(tokens.to("cpu" if stays_on_disk(checkpoint) else compute.device), 1)
    return torch.cat([answer(model(row, use_cache=False)) for row in rows]).cpu(), info
