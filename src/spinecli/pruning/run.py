"""`spine prune` as a library call: score, allocate, cut, prove, publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue
from safetensors.torch import save_file

from spinecli.artifacts.directory import OutputOptions, check_output, require_space
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.objective import Objective, objective_of
from spinecli.calibration.reload import probe, streamed_logits, verify_written
from spinecli.calibration.stream import BlockStream
from spinecli.checkpoints.cutting import write_cut
from spinecli.errors import OptionError
from spinecli.progress import Progress, silent
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
from spinecli.pruning.scoring import score_checkpoint
from spinecli.pruning.search import Candidate, Judgement, judge
from spinecli.pruning.selection import Scores, select

SCORES_NAME = "scores.safetensors"


@dataclass(frozen=True, eq=False)
class Decision:
    """What a run decided to cut, and on what grounds."""

    scores: Scores
    plan: PrunePlan
    judgements: tuple[Judgement, ...]
    """Of every allocation that was compared; empty if there was nothing to compare."""
    objective: Objective
    """By which they were compared."""

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        return {
            **self.plan.report(),
            "block_influence": self.scores.influence.tolist(),
            "compared_by": self.objective.name,
            "compared": [
                {
                    "removed_blocks": judgement.allocation.removed_blocks,
                    "shape": asdict(judgement.allocation.shape),
                    self.objective.key: judgement.loss,
                }
                for judgement in self.judgements
            ],
        }


def decide(
    request: PruneRequest,
    state: Path | None = None,
    stopwatch: Stopwatch | None = None,
    progress: Progress = silent,
) -> Decision:
    """Score the checkpoint and choose the masks; writes nothing but its own state.

    Args:
        state: directory for the passes' journals; None keeps none.
    """
    stopwatch = stopwatch or Stopwatch()
    checkpoint, calibration = request.checkpoint, request.calibration
    stream = BlockStream(checkpoint, calibration.length, request.options.compute, stopwatch)
    journal = _journal(state, "scoring")
    scores = score_checkpoint(stream, calibration.tokens, request.method, journal, stopwatch, progress)

    def compared(allocations: list[Allocation], phase: str) -> list[Judgement]:
        candidates = [
            Candidate(each, select(scores, each, checkpoint.shape, request.protected)) for each in allocations
        ]
        tokens = calibration.tokens[: request.search_rows]
        journal = _journal(state, phase)
        return judge(stream, tokens, request.held_out_rows, candidates, phase, journal, stopwatch, progress)

    judgements: list[Judgement] = []
    allocation = _fixed_allocation(request)
    if allocation is None:
        judgements += compared(block_candidates(request.budget), "comparing blocks")
        others = head_candidates(request.budget, _best(judgements))
        judgements += compared(others, "comparing heads") if others else []
        allocation = _best(judgements)
    if allocation.sparsity <= 0:
        raise OptionError(
            f"Sparsity {request.options.sparsity:g} is less than the smallest piece that can leave; "
            "raise --sparsity or lower --round-to."
        )
    masks = select(scores, allocation, checkpoint.shape, request.protected)
    plan = plan_prune(checkpoint, masks, calibration.length, run_memory(request))
    return Decision(scores, plan, tuple(judgements), objective_of(checkpoint))


def prune(
    request: PruneRequest, output: OutputOptions, stopwatch: Stopwatch | None = None, progress: Progress = silent
) -> Manifest:
    """Prune a checkpoint into a new directory.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, VerificationError, and what reading can raise.
    """
    stopwatch = stopwatch or Stopwatch()
    run = Run(
        kind="pruned-checkpoint",
        command="prune",
        parameters=request.options.parameters(),
        seed=request.options.seed,
        inputs={"model": request.source, "calibration": request.calibration.source()},
        lineage=request.lineage,
    )
    if finished := run.finished(output):
        return finished
    check_output(output, [request.checkpoint.path])
    require_space(output.path.parent, int(request.checkpoint.bytes * (1 - request.options.sparsity)))
    with run.working(output) as work:
        decision = decide(request, work.state, stopwatch, progress)
        plan, checkpoint = decision.plan, request.checkpoint
        with stopwatch("writing"):
            write_cut(work.files, checkpoint, plan.masks, progress)
            save_file(decision.scores.tensors(), work.files / SCORES_NAME)
        with stopwatch("verifying"):
            tokens, compute = probe(checkpoint, request.calibration.tokens), request.options.compute
            expected = streamed_logits(checkpoint, tokens, plan.masks, compute, stopwatch)
            difference = verify_written(work.files, tokens, expected, compute, stopwatch)
        summary = f"{request.method.name}, {plan.sparsity:.1%} of block parameters removed"
        report = {**decision.report(), "largest_logit_difference": difference}
        return run.publish(work, summary, report, stopwatch.measured())


def _journal(state: Path | None, name: str) -> PassJournal | None:
    return PassJournal(state, name) if state else None


def _fixed_allocation(request: PruneRequest) -> Allocation | None:
    """The allocation that the options ask for; None if it is to be found by comparison."""
    if not request.method.cuts_units:
        return allocate_blocks(request.budget)
    if request.searches:
        return None
    return allocate_share(request.budget, (request.options.block_share or 0.0) if request.method.cuts_blocks else 0.0)


def _best(judgements: Sequence[Judgement]) -> Allocation:
    """The allocation with the lowest loss; the first of equals."""
    return min(judgements, key=lambda judgement: judgement.loss).allocation
