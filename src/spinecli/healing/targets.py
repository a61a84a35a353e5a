"""What the dense model says of every next token: its likeliest tokens, kept on disk before the student is loaded.

The teacher runs through the block stream, so it is never in memory beside the student, on parts of the rows, whose
files a resumed run finds again. Of each position the `k` largest log-probabilities are kept, and what they leave of 1
is one more outcome, "the rest".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.whole_file import whole_file
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream, ComputeOptions
from spinecli.data.rows import TokenRows
from spinecli.healing.processes import Processes

PHASE = "asking the dense model"
# Hidden states of the teacher that are in memory at once, and logits.
_STREAM_BYTES = 256 << 20
_LOGIT_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Targets:
    """What is predicted at some positions, by one model."""

    tokens: Tensor
    """(positions, k) int64: the likeliest next tokens."""
    log_probabilities: Tensor
    """(positions, k) float32."""


@dataclass(frozen=True)
class TargetCache:
    """The teacher's answers to rows, in files of some rows each."""

    directory: Path
    rows_per_file: int

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows (rows,) int64: the tokens and log-probabilities, (rows, length - 1, k) each."""
        tokens, found = [], []
        for row in rows.tolist():
            number, place = divmod(row, self.rows_per_file)
            with safe_open(self.path(number), framework="pt") as handle:
                tokens.append(handle.get_slice("tokens")[place].long())
                found.append(handle.get_slice("log_probabilities")[place].float())
        return torch.stack(tokens), torch.stack(found)

    def path(self, number: int) -> Path:
        """Of one of the files."""
        return self.directory / f"teacher-{number:05d}.safetensors"


def rows_per_file(d_model: int, length: int) -> int:
    """How many rows the teacher is asked about at a time."""
    return max(1, _STREAM_BYTES // (2 * length * d_model * torch.float32.itemsize))


@torch.no_grad()
def ask_teacher(
    teacher: Checkpoint,
    rows: TokenRows,
    k: int,
    temperature: float,
    compute: ComputeOptions,
    directory: Path,
    context: RunContext,
    processes: Processes | None = None,
) -> TargetCache:
    """Write the teacher's answers to all rows, but for those that are there already.

    Log-probabilities are of softmax(logits / temperature), in float16: of a probability that is a relative error of
    0.05 % near 1 and of 0.8 % at 1e-7.
    """
    cache = TargetCache(directory, rows_per_file(teacher.d_model, rows.length))
    parts = torch.split(rows.tokens, cache.rows_per_file)
    stream = BlockStream(teacher, rows.length, compute, context, len(rows.frame.opening))
    steps = stream.blocks + 1
    processes = processes or Processes()
    own = processes.share(torch.arange(len(parts))).tolist()
    for place, number in enumerate(own):
        if cache.path(number).is_file():
            continue
        tokens = parts[number]
        with context.stopwatch("computing"):
            hidden = stream.embed(tokens)
            for index, block in enumerate(stream.loaded_blocks()):
                hidden = stream.run(block, hidden)
                context.progress(PHASE, place * steps + index + 1, len(own) * steps)
            answers = list(_likeliest(stream, hidden, k, temperature))
        kept = {
            "tokens": torch.cat([tokens for tokens, _ in answers]).view(len(tokens), rows.length - 1, -1),
            "log_probabilities": torch.cat([found for _, found in answers]).view(len(tokens), rows.length - 1, -1),
        }
        with whole_file(cache.path(number)) as part:
            save_file(kept, part)
        context.progress(PHASE, (place + 1) * steps, len(own) * steps)
    processes.wait()
    return cache


def _likeliest(stream: BlockStream, hidden: Tensor, k: int, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (positions, k) int32 and log-probabilities (positions, k) float16 of hidden (rows, length, d_model)."""
    vocabulary = int(stream.checkpoint.config.vocab_size)
    together = max(16, _LOGIT_BYTES // (4 * vocabulary))
    with stream.token_logits() as logits:
        for chunk in torch.split(hidden[:, :-1].flatten(0, 1), together):
            found, tokens = (logits(chunk) / temperature).log_softmax(dim=-1).topk(min(k, vocabulary), dim=-1)
            yield tokens.to("cpu", torch.int32), found.to("cpu", torch.float16)
