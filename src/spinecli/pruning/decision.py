"""What to cut: scores, then the ways to spend the budget, compared by what they are worth after a recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.objective import Objective, objective_of
from spinecli.calibration.stream import BlockStream
from spinecli.errors import OptionError
from spinecli.progress import Progress, silent
from spinecli.pruning.adaptive.candidates import adaptive_candidates
from spinecli.pruning.adaptive.sensitivity import sensitivities
from spinecli.pruning.allocation import (
    Allocation,
    allocate_blocks,
    allocate_share,
    block_candidates,
    head_candidates,
)
from spinecli.pruning.memory import run_memory
from spinecli.pruning.plan import PrunePlan, plan_prune
from spinecli.pruning.request import PruneRequest
from spinecli.pruning.scores import Scores
from spinecli.pruning.scoring import score_checkpoint
from spinecli.pruning.search import Candidate, Judgement, judge
from spinecli.pruning.selection import last_of_their_kind, select

# Share of the block parameters by which a cut may miss the asked sparsity and still be compared with others.
_SHORTFALL = 0.005


@dataclass(frozen=True, eq=False)
class Decision:
    """What a run decided to cut, and on what grounds."""

    scores: Scores
    plan: PrunePlan
    judgements: tuple[Judgement, ...]
    """Of every allocation that was compared; empty if there was nothing to compare."""
    objective: Objective
    """By which they were compared."""
    kept_for_their_kind: dict[int, str]
    """Blocks that stay as the last with their kind of attention -> that kind."""

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        return {
            **self.plan.report(),
            "kept_for_their_kind": {str(index): kind for index, kind in self.kept_for_their_kind.items()},
            "block_influence": self.scores.influence.tolist(),
            "compared_by": self.objective.name,
            "compared": [
                {**judgement.allocation.report(), self.objective.key: judgement.loss} for judgement in self.judgements
            ],
        }


def decide(
    request: PruneRequest,
    state: Path | None = None,
    stopwatch: Stopwatch | None = None,
    progress: Progress = silent,
    findings: Path | None = None,
) -> Decision:
    """Score the checkpoint and choose the masks; writes nothing but its own state.

    Args:
        state: directory for the passes' journals; None keeps none.
        findings: directory for what does not depend on the sparsity, to be shared by runs that differ in nothing else
            but the sparsity and the widths; None keeps it with the state.
    """
    stopwatch, findings = stopwatch or Stopwatch(), findings or state
    checkpoint, calibration = request.checkpoint, request.calibration
    opening = len(calibration.frame.opening)
    stream = BlockStream(checkpoint, calibration.length, request.options.compute, stopwatch, opening)
    scores = score_checkpoint(
        stream, calibration.tokens, request.method, _journal(findings, "scoring"), stopwatch, progress
    )
    tokens = calibration.tokens[: request.search_rows]
    last = last_of_their_kind(scores.influence, checkpoint.attention_kinds, request.protected)
    protected = request.protected | last.keys()

    def compared(candidates: Sequence[Candidate], phase: str) -> list[Judgement]:
        journal = _journal(state, phase)
        return judge(stream, tokens, request.held_out_rows, candidates, phase, journal, stopwatch, progress)

    def uniform(allocation: Allocation) -> Candidate:
        return Candidate(allocation, select(scores, allocation, checkpoint.shape, protected))

    judgements: list[Judgement] = []
    chosen = [uniform(fixed)] if (fixed := _fixed_allocation(request)) else []
    if request.budget and request.searches:
        judgements += compared([uniform(each) for each in block_candidates(request.budget)], "comparing blocks")
        best = _best(judgements).allocation
        assert isinstance(best, Allocation)
        if others := head_candidates(request.budget, best):
            judgements += compared([uniform(each) for each in others], "comparing heads")
        chosen = [_best(judgements)]
    if request.adaptive:
        measured = sensitivities(
            stream, calibration.tokens, scores, _journal(findings, "sensitivity"), stopwatch, progress
        )
        removed = [frozenset(candidate.masks.removed_blocks) for candidate in chosen]
        budget = replace(request.adaptive, protected=protected)
        candidates = adaptive_candidates(budget, scores, measured, [frozenset(), *removed])
        unjudged = [] if judgements else chosen
        judgements += compared([*unjudged, *candidates], "comparing widths")
        if not judgements:
            raise OptionError(
                f"Sparsity {request.options.sparsity:g} cannot be met with the blocks' own widths; lower --sparsity, "
                "--round-to or the number of blocks that --protect names."
            )
        chosen = [_best(_meeting(judgements, request.options.sparsity))]
    masks = chosen[0].masks
    plan = plan_prune(checkpoint, masks, calibration.length, run_memory(request))
    if plan.sparsity <= 0:
        raise OptionError(
            f"Sparsity {request.options.sparsity:g} is less than the smallest piece that can leave; "
            "raise --sparsity or lower --round-to."
        )
    return Decision(scores, plan, tuple(judgements), objective_of(checkpoint), last)


def _journal(state: Path | None, name: str) -> PassJournal | None:
    return PassJournal(state, name) if state else None


def _fixed_allocation(request: PruneRequest) -> Allocation | None:
    """The uniform allocation that the options ask for; None if it is to be found by comparison."""
    if request.budget is None:
        return None
    if not request.method.cuts_units:
        return allocate_blocks(request.budget)
    if request.searches:
        return None
    blocks_leave = request.method.cuts_blocks
    share = request.options.block_share if blocks_leave else None
    return allocate_share(request.budget, share or 0.0, blocks_leave=blocks_leave)


def _meeting(judgements: Sequence[Judgement], sparsity: float) -> Sequence[Judgement]:
    """Those that remove what was asked for: equal widths may fall short of it by whole units, and then lose less."""
    met = [judgement for judgement in judgements if judgement.allocation.sparsity >= sparsity - _SHORTFALL]
    return met or judgements


def _best(judgements: Sequence[Judgement]) -> Candidate:
    """The candidate with the lowest loss; the first of equals."""
    return min(judgements, key=lambda judgement: judgement.loss).candidate
