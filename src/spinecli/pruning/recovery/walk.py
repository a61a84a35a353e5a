"""Teacher and students walking through the blocks together.

A student whose next blocks are removed is tuned late: its last block before the gap is fitted to the teacher's stream
behind the gap, so that it takes over what it can of the removed blocks' work.

    teacher   ─ 0 ─ 1 ─ 2 ─ 3 ─ 4 ─▶
    student   ─ 0 ─ 1 ───────── 4 ─▶      block 1 is tuned when the teacher has passed block 3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.pruning.recovery.block import TeacherTargets, teach

Follow = Callable[[int, TeacherTargets, Sequence[int]], None]
"""Called with a dense block's index, what the teacher taught there, and the numbers of the students to tune."""

Kept = Sequence[bool]
"""Of every block of the teacher, whether a student keeps it."""

_TEACHER = "teacher"


def walk(
    teacher: BlockStream,
    hidden: Tensor,
    students: Sequence[Kept],
    streams: dict[str, Tensor],
    follow: Follow,
    phase: str,
    context: RunContext,
) -> Tensor:
    """Run the teacher over all blocks and call `follow` whenever students can be tuned.

    Args:
        hidden: the teacher's hidden states before block 0, (rows, length, d_model).
        students: which of the teacher's blocks each student keeps.
        streams: the students' hidden states by name, (rows, length, d_model) each; `follow` replaces them, and they are
            saved and restored with the teacher's.
        phase: for the progress and the journal.

    Returns: the teacher's hidden states behind its last block, (rows, length, d_model).
    """
    waiting_targets: dict[int, TeacherTargets] = {}
    first, journal = 0, context.journal(phase)
    if journal and (saved := journal.load()):
        first = saved.finished
        hidden, waiting_targets = _restore(saved.tensors, streams, teacher.compute.device)
    for dense in range(first, teacher.blocks):
        with teacher.block(dense) as block:
            waiting_targets[dense] = teach(teacher, block, hidden)
        hidden = waiting_targets[dense].after
        for index, members in _ready(students, dense).items():
            follow(index, replace(waiting_targets[index], after=hidden), members)
        waiting = {last_kept(kept, dense) for kept in students if gap_end(kept, dense) > dense}
        waiting_targets = {index: targets for index, targets in waiting_targets.items() if index in waiting}
        if journal:
            state = {_TEACHER: hidden, **streams, **_flat(waiting_targets)}
            journal.save(dense + 1, state, last=dense + 1 == teacher.blocks)
        context.progress(phase, dense + 1, teacher.blocks)
    return hidden


def last_kept(kept: Kept, dense: int) -> int | None:
    """The last kept block at or before `dense`, or None."""
    return next((index for index in range(dense, -1, -1) if kept[index]), None)


def gap_end(kept: Kept, dense: int) -> int:
    """The last block of the run of removed blocks that follows `dense`, or `dense` itself."""
    end = dense
    while end + 1 < len(kept) and not kept[end + 1]:
        end += 1
    return end


def _ready(students: Sequence[Kept], dense: int) -> dict[int, list[int]]:
    """Which students can be tuned once the teacher has passed `dense`: block index -> student numbers."""
    ready: dict[int, list[int]] = {}
    for number, kept in enumerate(students):
        index = last_kept(kept, dense)
        if index is not None and gap_end(kept, index) == dense:
            ready.setdefault(index, []).append(number)
    return ready


def _flat(waiting_targets: dict[int, TeacherTargets]) -> dict[str, Tensor]:
    return {
        f"targets.{index}.{field.name}": getattr(targets, field.name)
        for index, targets in waiting_targets.items()
        for field in fields(TeacherTargets)
    }


def _restore(
    saved: dict[str, Tensor], streams: dict[str, Tensor], device: str
) -> tuple[Tensor, dict[int, TeacherTargets]]:
    """Put saved student streams back into `streams`; the teacher's stream and the targets that wait."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, value in saved.items():
        if name in streams:
            streams[name] = value.to(device)
        elif name.startswith("targets."):
            _, index, field = name.split(".")
            parts.setdefault(int(index), {})[field] = value.to(device)
    return saved[_TEACHER].to(device), {index: TeacherTargets(**tensors) for index, tensors in parts.items()}
