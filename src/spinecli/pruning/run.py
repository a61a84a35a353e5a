"""`spine prune` as a library call: score, allocate, cut, prove, publish."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue
from safetensors.torch import save_file

from spinecli.artifacts.directory import (
    OutputOptions,
    check_output,
    fingerprint_of,
    finished_run,
    require_space,
    work_directory,
)
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.manifest import Manifest, record_files
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.calibration.reload import probe, streamed_logits, verify_written
from spinecli.calibration.stream import BlockStream
from spinecli.checkpoints.cutting import cut_config, plan_cut
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.progress import Progress, silent
from spinecli.pruning.allocation import (
    BLOCK_SHARES,
    HEAD_FACTORS,
    Allocation,
    allocate_blocks,
    allocate_share,
    candidates,
)
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

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        return {
            **self.plan.report(),
            "block_influence": self.scores.influence.tolist(),
            "compared": [
                {
                    "removed_blocks": judgement.allocation.removed_blocks,
                    "shape": asdict(judgement.allocation.shape),
                    "loss": judgement.loss,
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
    tokens, checkpoint = request.calibration.tokens, request.checkpoint
    stream = BlockStream(checkpoint, request.calibration.length, request.options.compute, stopwatch)
    scores = score_checkpoint(stream, tokens, request.method, _journal(state, "scoring"), stopwatch, progress)
    options = [
        Candidate(allocation, select(scores, allocation, checkpoint.shape, request.protected))
        for allocation in _allocations(request)
    ]
    judgements: list[Judgement] = []
    if len(options) > 1:
        held_out, journal = request.held_out_rows, _journal(state, "comparing")
        compared = tokens[: request.search_rows]
        judgements = judge(stream, compared, held_out, options, journal, stopwatch, progress)
        losses = [judgement.loss for judgement in judgements]
        best = options[losses.index(min(losses))]
    else:
        best = options[0]
    plan = plan_prune(
        checkpoint, best.masks, request.calibration.rows, request.calibration.length, gram=request.method.needs_gram
    )
    return Decision(scores, plan, tuple(judgements))


def prune(
    request: PruneRequest, output: OutputOptions, stopwatch: Stopwatch | None = None, progress: Progress = silent
) -> Manifest:
    """Prune a checkpoint into a new directory.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, VerificationError, and what reading can raise.
    """
    stopwatch = stopwatch or Stopwatch()
    parameters, seed = request.options.parameters(), request.options.seed
    inputs = {"model": request.source, "calibration": request.calibration.source()}
    fingerprint = fingerprint_of("prune", parameters, seed, inputs)
    if finished := finished_run(output, fingerprint):
        return finished
    check_output(output, [request.checkpoint.path])
    require_space(output.path.parent, int(request.checkpoint.bytes * (1 - request.options.sparsity)))
    with work_directory(output, fingerprint) as work:
        decision = decide(request, work.state, stopwatch, progress)
        plan, checkpoint = decision.plan, request.checkpoint
        with stopwatch("writing"):
            config = cut_config(checkpoint, plan.masks)
            write_checkpoint(work.files, config, plan_cut(checkpoint, plan.masks), checkpoint.path, progress)
            plan.masks.save(work.files)
            save_file(decision.scores.tensors(), work.files / SCORES_NAME)
        with stopwatch("verifying"):
            tokens, compute = probe(request.calibration.tokens), request.options.compute
            expected = streamed_logits(checkpoint, tokens, plan.masks, compute, stopwatch)
            difference = verify_written(work.files, tokens, expected, compute, stopwatch)
        manifest = Manifest(
            kind="pruned-checkpoint",
            command="prune",
            parameters=parameters,
            seed=seed,
            inputs=inputs,
            outputs=record_files(work.files),
            lineage=request.lineage,
            summary=f"{request.method.name}, {plan.sparsity:.1%} of block parameters removed",
            report={**decision.report(), "largest_logit_difference": difference},
            measured=stopwatch.measured(),
        )
        work.publish(manifest)
    return manifest.sealed()


def _journal(state: Path | None, name: str) -> PassJournal | None:
    return PassJournal(state, name) if state else None


def _allocations(request: PruneRequest) -> list[Allocation]:
    """The allocations to choose from: one, unless the search is on."""
    method, budget = request.method, request.budget
    if not method.cuts_units:
        return [allocate_blocks(budget)]
    if request.searches:
        return candidates(budget, BLOCK_SHARES, HEAD_FACTORS)
    share = (request.options.block_share or 0.0) if method.cuts_blocks else 0.0
    return [allocate_share(budget, share)]
