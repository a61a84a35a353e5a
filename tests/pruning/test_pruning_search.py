from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from families import Recipe, random_tokens, recipe
from hypothesis import given
from hypothesis import strategies as st

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.journal import PassJournal
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import cut_checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.checkpoints.stream.objective import objective_of
from spinecli.pruning.allocation import Allocation, select_shapes, shapes_after
from spinecli.pruning.method import UnitScores
from spinecli.pruning.recovery import block as fitting
from spinecli.pruning.recovery.least_squares import LayerProblem, LayerRecovery, untuned
from spinecli.pruning.scoring import Scores
from spinecli.pruning.search import (
    FITTED_TOKENS,
    JUDGING_TOKENS,
    Candidate,
    candidate_fit,
    score_candidates,
    search_rows,
)

Opened = Callable[[Recipe], Checkpoint]
TOKENS = random_tokens(12, 16)


def candidates_of(checkpoint: Checkpoint, *, masked: bool = True) -> list[Candidate]:
    """Three ways to cut; under masks or under shapes."""
    generator = torch.Generator().manual_seed(0)
    blocks = checkpoint.blocks
    units = (UnitScores(torch.rand(4, generator=generator), torch.rand(40, generator=generator)) for _ in range(blocks))
    scores = Scores(torch.rand(blocks, generator=generator), tuple(units))
    found = []
    for removed, channels in [(0, 16), (1, 24), (2, 32)]:
        allocation = Allocation(removed, BlockShape(4, 4, 8, channels), 0.0)
        shapes = shapes_after(scores, allocation, frozenset())
        masks = select_shapes(scores, shapes, checkpoint.shapes) if masked else None
        found.append(Candidate(allocation, shapes, masks))
    return found


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "shapes"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_candidates_do_not_disturb_each_other(opened: Opened, family: str, masked: bool) -> None:
    stream = BlockStream(opened(recipe(family, blocks=4)), 16)
    candidates = candidates_of(stream.checkpoint, masked=masked)
    together = score_candidates(stream, TOKENS, candidates, "comparing")
    assert [each.allocation for each in together] == [candidate.allocation for candidate in candidates]
    alone = [score_candidates(stream, TOKENS, [candidate], "comparing")[0] for candidate in candidates]
    assert [each.held_out for each in together] == [each.held_out for each in alone]
    assert len({each.held_out for each in alone}) == 3


def test_masks_and_shapes_may_be_compared_together(opened: Opened) -> None:
    stream = BlockStream(opened(recipe("llama", blocks=4)), 16)
    masked, shaped = (candidates_of(stream.checkpoint, masked=each)[0] for each in (True, False))
    both = score_candidates(stream, TOKENS, [masked, shaped], "comparing")
    alone = [score_candidates(stream, TOKENS, [each], "comparing")[0] for each in (masked, shaped)]
    assert [each.held_out for each in both] == [each.held_out for each in alone]
    assert both[0].held_out != both[1].held_out, "the masks are drawn by lot"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_unfitted_candidate_is_judged_as_the_cut_that_its_masks_make(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    def left_alone(problem: LayerProblem, *_: object) -> LayerRecovery:
        return LayerRecovery(untuned(problem), "untuned", 0.0, 0.0)

    monkeypatch.setattr(fitting, "recover", left_alone)
    checkpoint = opened(recipe(family, blocks=4))
    candidate = candidates_of(checkpoint)[1]
    stream = BlockStream(checkpoint, 16)
    [judged] = score_candidates(stream, TOKENS, [candidate], "comparing")
    _, judging = search_rows(*TOKENS.shape)
    assert candidate.masks is not None
    cut = BlockStream(cut_checkpoint(checkpoint, candidate.masks), 16).forward(TOKENS[-judging:])
    dense = stream.forward(TOKENS[-judging:])
    expected = objective_of(checkpoint).measure(stream, {"cut": cut}, dense)["cut"].mean()
    assert judged.held_out == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "shapes"])
def test_an_uncut_candidate_is_as_good_as_the_dense_model(opened: Opened, masked: bool) -> None:
    checkpoint = opened(recipe("llama", blocks=4))
    masks = Masks.full(checkpoint.shapes) if masked else None
    whole = Candidate(Allocation(0, checkpoint.shape, 0.0), checkpoint.shapes, masks)
    [judged] = score_candidates(BlockStream(checkpoint, 16), TOKENS, [whole], "comparing")
    assert judged.held_out == pytest.approx(0, abs=1e-6)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "shapes"])
def test_a_comparison_killed_anywhere_resumes_to_the_same_answer(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    monkeypatch.setattr("spinecli.artifacts.journal.PassJournal", partial(PassJournal, share=float("inf")))
    stream = BlockStream(opened(recipe("llama", blocks=4)), 16)
    candidates = candidates_of(stream.checkpoint, masked=masked)
    whole = score_candidates(stream, TOKENS, candidates, "comparing")
    seen: list[int] = []

    def kill_at_new(_: str, done: int, total: int) -> None:
        if done not in seen:
            seen.append(done)
            raise Killed

    resumed = None
    while resumed is None:
        try:
            context = RunContext(progress=kill_at_new, state=tmp_path)
            resumed = score_candidates(stream, TOKENS, candidates, "comparing", context)
        except Killed:
            continue
    assert seen == [1, 2, 3, 4]
    assert [each.held_out for each in resumed] == [each.held_out for each in whole]


@given(rows=st.integers(4, 4000), length=st.integers(1, 4096))
def test_rows_that_compare_candidates_are_not_fitted_to(rows: int, length: int) -> None:
    fitted, judging = search_rows(rows, length)
    assert fitted + judging <= rows
    assert 1 <= judging <= rows / 2
    assert fitted * length < FITTED_TOKENS + length
    assert judging * length < JUDGING_TOKENS + length
    fit = candidate_fit(fitted, judging)
    assert len(fit.fitting) == len(fit.judging) == fitted + judging
    assert fit.fitting.any()
    assert fit.judging.any()
    assert not (fit.fitting & fit.judging).any()
    assert not (fit.fitting | fit.judging)[fitted:].any()
    assert (fit.fitting | fit.judging)[:fitted].all()
