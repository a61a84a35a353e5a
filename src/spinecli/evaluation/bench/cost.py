"""What a generation must compute and read, counted from shapes: what a smaller model promises before it is timed.

prefill  is bound by arithmetic: its time follows the FLOPs
decode   is bound by memory: every step reads all weights and the keys and values of all tokens so far
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.evaluation.bench.results import EngineRun, Speedup, Speedups, Spread
from spinecli.evaluation.results import Rates


@dataclass(frozen=True)
class Cost:
    """Sizes from which the work of one pass follows, whatever the model's blocks look like."""

    matrices: float
    """Elements of the blocks' matrices that a token is multiplied with."""
    head: int
    """Elements of the output head; 0 for a classifier, whose head runs once a row."""
    weight_bytes: float
    """Bytes of the blocks and the head in memory: what one decode step reads."""
    query_width: int
    """heads * head size, summed over the blocks."""
    cache_width: int
    """Elements of keys and values that one token leaves in the cache, over all blocks."""
    cache_element: int
    """Bytes of one of them."""
    causal: bool = True
    """A token attends to those before it and itself; else to all."""

    def prefill_flops(self, length: int, batch: int = 1) -> float:
        """FLOPs of one pass over `batch` rows of `length` tokens, the head on each row's last token.

        Two a multiply-add: every token meets every matrix, and a query meets a key and a value for every token that it
        attends to.
        """
        attended = length * (length + 1) / 2 if self.causal else length * length
        return batch * (2 * self.matrices * length + 4 * self.query_width * attended + 2 * self.head)

    def decode_bytes(self, length: int, new_tokens: int, batch: int = 1) -> float:
        """Bytes that a decode step reads, in the mean over the steps that follow a prompt of `length` tokens.

        The first of `new_tokens` comes from the prefill, so step s of new_tokens - 1 attends to length + s tokens. The
        weights are read once a step, however many rows there are.
        """
        attended = length + new_tokens / 2
        return self.weight_bytes + batch * self.cache_width * self.cache_element * attended


def checkpoint_cost(checkpoint: Checkpoint, dtype: torch.dtype) -> Cost:
    """The cost of a checkpoint that torch holds in `dtype`, its cache included."""
    names = [name for index in range(checkpoint.blocks) for name in checkpoint.block_names(index).values()]
    shapes = [torch.Size(checkpoint.tensors[name].shape) for name in names]
    head = int(checkpoint.config.vocab_size) * checkpoint.d_model if checkpoint.task is Task.causal_lm else 0
    return Cost(
        matrices=sum(shape.numel() for shape in shapes if len(shape) > 1),
        head=head,
        weight_bytes=dtype.itemsize * (sum(shape.numel() for shape in shapes) + head),
        query_width=sum(shape.heads * shape.head_dim for shape in checkpoint.shapes),
        cache_width=sum(2 * shape.kv_heads * shape.head_dim for shape in checkpoint.shapes),
        cache_element=dtype.itemsize,
        causal=checkpoint.family.kind == "causal",
    )


def spread(samples: Sequence[float]) -> Spread:
    """Median, minimum and maximum."""
    return Spread(median=median(samples), minimum=min(samples), maximum=max(samples), samples=tuple(samples))


def speedup(own: Rates, reference: Rates, promised: float) -> Speedup:
    """The ratios within each round; what falls on all models of a round alike leaves them unchanged."""
    ratios = [ours / other for ours, other in zip(own.samples, reference.samples, strict=True)]
    return Speedup(measured=spread(ratios), promised=promised)


def compared(runs: Sequence[EngineRun]) -> tuple[EngineRun, ...]:
    """The runs of one engine with their speed-ups over the first."""
    first, *others = runs
    return (first, *(run.model_copy(update={"speedups": _speedups(run, first)}) for run in others))


def _speedups(run: EngineRun, first: EngineRun) -> Speedups:
    flops = first.work.pass_flops / run.work.pass_flops
    if run.forward is not None and first.forward is not None:
        return Speedups(forward=speedup(run.forward.rows, first.forward.rows, flops))
    if run.latency is None or first.latency is None or run.work.step_bytes is None or first.work.step_bytes is None:
        raise ValueError("the runs of an engine are all of language models or all of classifiers")
    return Speedups(
        prefill=speedup(run.latency.prefill, first.latency.prefill, flops),
        decode=speedup(run.latency.decode, first.latency.decode, first.work.step_bytes / run.work.step_bytes),
    )
