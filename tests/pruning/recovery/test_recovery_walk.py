from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from families import Recipe, random_tokens, recipe
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.journal import PassJournal
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.pruning.recovery.block import TeacherTargets
from spinecli.pruning.recovery.walk import gap_end, last_kept, walk

Opened = Callable[[Recipe], Checkpoint]
TOKENS = random_tokens(3, 8)


def kept_of(blocks: str) -> list[bool]:
    """`blocks` says block by block: x stays, . leaves."""
    return [block == "x" for block in blocks]


@pytest.mark.parametrize(
    ("kept", "last", "ends"),
    [
        ("xxxx", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("x..x", [0, 0, 0, 3], [2, 2, 2, 3]),
        (".xx.", [None, 1, 2, 2], [0, 1, 3, 3]),
        ("..x.x", [None, None, 2, 2, 4], [1, 1, 3, 3, 4]),
    ],
)
def test_gaps(kept: str, last: list[int | None], ends: list[int]) -> None:
    blocks = kept_of(kept)
    assert [last_kept(blocks, index) for index in range(len(kept))] == last
    assert [gap_end(blocks, index) for index in range(len(kept))] == ends


class Walked:
    """A walk whose students only note what they are told."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Sequence[str],
        state: Path | None = None,
        stop_after: int = 99,
        passed: list[int] | None = None,
    ) -> None:
        self.calls: list[tuple[int, list[int]]] = []
        self.targets: list[TeacherTargets] = []
        self.passed: list[int] = [] if passed is None else passed
        self.streams: dict[str, Tensor] = {f"student {n}": torch.zeros(1) for n in range(len(kept))}

        def follow(index: int, targets: TeacherTargets, members: Sequence[int]) -> None:
            if len(self.passed) >= stop_after:
                raise KeyboardInterrupt
            self.calls.append((index, list(members)))
            self.targets.append(targets)
            for number in members:
                self.streams[f"student {number}"] = self.streams[f"student {number}"] + index + 1

        teacher = BlockStream(checkpoint, 8)
        walk(
            teacher,
            teacher.embed(TOKENS),
            [kept_of(each) for each in kept],
            self.streams,
            follow,
            "walking",
            RunContext(progress=lambda _, done, total: self.passed.append(done), state=state),
        )


def hidden_states(checkpoint: Checkpoint) -> list[Tensor]:
    stream = BlockStream(checkpoint, 8)
    states = [stream.embed(TOKENS)]
    for block in stream.loaded_blocks():
        states.append(stream.run(block, states[-1]))
    return states


FIVE = recipe("llama", blocks=5)


@pytest.mark.parametrize(
    ("kept", "tuned"),
    [
        ("xxxxx", [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        ("x..xx", [(0, 2), (3, 3), (4, 4)]),
        (".xxxx", [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ("xxx..", [(0, 0), (1, 1), (2, 4)]),
        ("..x.x", [(2, 3), (4, 4)]),
        ("x.x.x", [(0, 1), (2, 3), (4, 4)]),
    ],
)
def test_a_block_before_a_gap_learns_what_lies_behind_it(
    opened: Opened, kept: str, tuned: list[tuple[int, int]]
) -> None:
    checkpoint = opened(FIVE)
    walked = Walked(checkpoint, [kept])
    states = hidden_states(checkpoint)
    assert walked.calls == [(index, [0]) for index, _ in tuned]
    for targets, (index, end) in zip(walked.targets, tuned, strict=True):
        torch.testing.assert_close(targets.after, states[end + 1])
        torch.testing.assert_close(targets.feed_forward_sum, states[index + 1])


def test_students_are_tuned_when_their_own_gap_is_passed(opened: Opened) -> None:
    walked = Walked(opened(FIVE), ["xxxxx", "x..xx", ".xxxx"])
    by_student = {n: [index for index, members in walked.calls if n in members] for n in range(3)}
    assert by_student == {0: [0, 1, 2, 3, 4], 1: [0, 3, 4], 2: [1, 2, 3, 4]}
    assert walked.calls.index((0, [1])) > walked.calls.index((1, [0, 2]))


@pytest.mark.parametrize("kept", ["xxxxx", "x..xx", ".xx..", "x.x.x"])
def test_a_walk_goes_on_where_it_was_killed(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    monkeypatch.setattr("spinecli.artifacts.journal.PassJournal", partial(PassJournal, share=float("inf")))
    checkpoint = opened(FIVE)
    whole = Walked(checkpoint, [kept])
    for stop in range(1, 5):
        state = tmp_path / str(stop)
        state.mkdir()
        passed: list[int] = []
        with suppress(KeyboardInterrupt):
            Walked(checkpoint, [kept], state, stop, passed)
        rest = Walked(checkpoint, [kept], state)
        assert passed
        assert passed + rest.passed == [1, 2, 3, 4, 5]
        assert rest.calls == whole.calls[len(whole.calls) - len(rest.calls) :]
        assert torch.equal(rest.streams["student 0"], whole.streams["student 0"])
        for one, other in zip(reversed(rest.targets), reversed(whole.targets), strict=False):
            assert torch.equal(one.attention_sum, other.attention_sum)
            assert torch.equal(one.feed_forward_sum, other.feed_forward_sum)
            assert torch.equal(one.after, other.after)


def test_progress_counts_teacher_blocks(opened: Opened) -> None:
    assert Walked(opened(FIVE), ["x...x"]).passed == [1, 2, 3, 4, 5]
