"""The scoring pass: one walk of the dense checkpoint's block stream, in which the method sees every block once."""

from __future__ import annotations

import torch
from torch import Tensor

from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.observation import observed
from spinecli.calibration.stream import BlockStream
from spinecli.progress import Progress, silent
from spinecli.pruning.method import BlockView, Method
from spinecli.pruning.scores import Scores, named
from spinecli.pruning.statistics import BlockInfluence, InputStatistics


def score_checkpoint(
    stream: BlockStream,
    tokens: Tensor,
    method: Method,
    journal: PassJournal | None = None,
    stopwatch: Stopwatch | None = None,
    progress: Progress = silent,
) -> Scores:
    """Scores of every block, KV group and channel.

    Args:
        tokens: (rows, length) calibration tokens.
        journal: where to save the pass and resume it from.
    """
    checkpoint = stream.checkpoint
    stopwatch = stopwatch or Stopwatch()
    found: dict[str, Tensor] = {"influence": torch.zeros(stream.blocks, dtype=torch.float64)}
    with stopwatch("computing"):
        hidden = stream.embed(tokens)
        first = 0
        if journal and (saved := journal.load()):
            first = saved.finished
            hidden = saved.tensors.pop("hidden").to(hidden.device)
            found = saved.tensors
        for index in range(first, stream.blocks):
            with stream.block(index) as block:
                family, shape = checkpoint.family, checkpoint.shapes[index]
                attention = InputStatistics(shape.heads * shape.head_dim, gram=method.needs_gram)
                feed_forward = InputStatistics(shape.channels, gram=method.needs_gram)
                influence = BlockInfluence()
                listeners = {
                    family.attention.output: attention.observe,
                    family.feed_forward.output: feed_forward.observe,
                }
                with observed(block, listeners):
                    after = stream.run(block, hidden)
                for before_row, after_row in zip(hidden, after, strict=True):
                    influence.observe(before_row, after_row)
                units = method.score(BlockView(block, family, shape, attention, feed_forward))
            found["influence"][index] = influence.value
            found |= named(index, units)
            hidden = after
            if journal:
                journal.save(index + 1, {**found, "hidden": hidden}, last=index + 1 == stream.blocks)
            progress("scoring blocks", index + 1, stream.blocks)
    return Scores.from_tensors(found)
