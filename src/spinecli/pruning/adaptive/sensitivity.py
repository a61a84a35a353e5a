"""How much the whole model suffers when one sub-layer is cut.

For every attention and every feed-forward layer two cuts are tried alone, with half of its units gone and with all of
them, each after a re-fit of what stays. All of them walk through the dense checkpoint together:

    dense    ─ 0 ─ 1 ─ 2 ─ … ─▶
    trials       └ 1 ─ 2 ─ … ─▶      trials of block 0: 4 streams from here on
                     └ 2 ─ … ─▶      trials of block 1

Scores of different blocks are not comparable as they stand; what the model as a whole loses is. That widths are found
so is this project's own, see docs/algorithms/spine.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.masks import BlockMask
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import BlockStream, LoadedBlock
from spinecli.checkpoints.stream.objective import objective_of
from spinecli.pruning.adaptive.damage import Sensitivity
from spinecli.pruning.allocation import select_shapes
from spinecli.pruning.config import TuneMethod
from spinecli.pruning.recovery.block import Fit, StudentBlock, TeacherTargets, fit_block, teach
from spinecli.pruning.recovery.recover import split_rows
from spinecli.pruning.scoring import Scores

SUB_LAYERS = ("attention", "mlp")

# All trials' streams together, besides those of the calibration rows.
_STREAM_BYTES = 768 << 20
_JUDGING_ROWS = 8
_FITTING_ROWS = 24
_RIDGE = 0.03
_FLOAT = torch.float32.itemsize


def sensitivities(
    stream: BlockStream, tokens: Tensor, scores: Scores, context: RunContext
) -> dict[tuple[int, str], Sensitivity]:
    """The sensitivity of every sub-layer that a block has, by block and name.

    Args:
        tokens: (rows, length) calibration tokens; some rows are fitted to, others judge.
    """
    checkpoint, blocks, journal = stream.checkpoint, stream.blocks, context.journal("sensitivity")
    judging = _judging_rows(len(tokens), blocks, tokens.shape[1] * checkpoint.d_model * _FLOAT)
    used = tokens[: _FITTING_ROWS + judging]
    fit = Fit(*split_rows(len(used), judging), TuneMethod.lsq, (_RIDGE,))
    trials: dict[str, Tensor] = {}
    with context.stopwatch("computing"):
        dense = stream.embed(used)
        first = 0
        if journal and (saved := journal.load()):
            first = saved.finished
            dense = saved.tensors.pop("dense").to(dense.device)
            trials = {name: value.to(dense.device) for name, value in saved.tensors.items()}
        for index in range(first, blocks):
            with stream.block(index) as block:
                targets = teach(stream, block, dense)
                trials = {name: stream.run(block, hidden) for name, hidden in trials.items()}
                for name, mask in _cuts(scores, index, checkpoint.shapes[index]).items():
                    trials[f"{index}.{name}"] = _tried(stream, block, targets, mask, dense, fit)[-judging:].clone()
            dense = targets.after
            if journal:
                journal.save(index + 1, {**trials, "dense": dense}, last=index + 1 == blocks)
            context.progress("measuring sensitivity", index + 1, blocks)
        measured = objective_of(checkpoint).measure(stream, trials, dense[-judging:])
    lost = {name: float(rows.mean()) for name, rows in measured.items()}
    return {
        (index, name): Sensitivity(lost[f"{index}.{name}.half"], lost[f"{index}.{name}.whole"])
        for index in range(blocks)
        for name in SUB_LAYERS
        if f"{index}.{name}.whole" in lost
    }


def trial_bytes(blocks: int, length: int, d_model: int, rows: int) -> int:
    """Bytes of all trials' streams at the end of the walk, with `rows` calibration rows of `length` tokens."""
    row_bytes = length * d_model * _FLOAT
    return _judging_rows(rows, blocks, row_bytes) * _trials(blocks) * row_bytes


def _judging_rows(rows: int, blocks: int, row_bytes: int) -> int:
    return max(1, min(_JUDGING_ROWS, _STREAM_BYTES // (_trials(blocks) * row_bytes), rows // 4))


def _trials(blocks: int) -> int:
    return 2 * len(SUB_LAYERS) * blocks


def _cuts(scores: Scores, index: int, shape: BlockShape) -> dict[str, BlockMask]:
    """The cuts of one block that are tried, by sub-layer and amount."""
    shapes = {
        f"attention.{amount}": BlockShape(groups * shape.group_size, groups, shape.head_dim, shape.channels)
        for amount, groups in (("half", (shape.kv_heads + 1) // 2), ("whole", 0))
        if shape.heads
    } | {
        f"mlp.{amount}": BlockShape(shape.heads, shape.kv_heads, shape.head_dim, channels)
        for amount, channels in (("half", (shape.channels + 1) // 2), ("whole", 0))
        if shape.channels
    }
    alone = Scores(scores.influence[index : index + 1], scores.units[index : index + 1])
    return {name: select_shapes(alone, (wanted,), (shape,)).blocks[0] for name, wanted in shapes.items()}


def _tried(
    stream: BlockStream, block: LoadedBlock, targets: TeacherTargets, mask: BlockMask, hidden: Tensor, fit: Fit
) -> Tensor:
    if not mask.kept:
        return hidden  # the block had this sub-layer alone
    student = StudentBlock(block, hidden, mask)
    return fit_block(stream, student, targets, fit, stream.checkpoint.storage_dtype).hidden
