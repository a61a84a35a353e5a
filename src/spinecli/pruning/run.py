"""`spine prune` as a library call: decide, cut, re-fit what stays if the method does, prove, publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue
from safetensors.torch import save_file

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions, WorkDirectory, check_output, require_space
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.run import Run
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.stream.verify import probe, random_rows, streamed_logits, verify_reading, verify_written
from spinecli.data.calibration_file import save_rows
from spinecli.data.rows import TokenRows
from spinecli.pruning.config import Effort
from spinecli.pruning.decision import Decision, decide, plan_prune
from spinecli.pruning.recovery.block import Fit
from spinecli.pruning.recovery.gated_layer import BranchTuning
from spinecli.pruning.recovery.recover import RecoveryTask, held_out_rows, recover_into, split_rows
from spinecli.pruning.request import PruneRequest

SCORES_NAME = "scores.safetensors"


def prune(
    request: PruneRequest, output: OutputOptions, context: RunContext | None = None, findings: Path | None = None
) -> Manifest:
    """Prune a checkpoint into a new directory.

    Args:
        findings: directory for what runs that differ in their sparsity alone can share; see `decide`. Rows that the
            model writes are kept there, too.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, VerificationError, and what reading can raise.
    """
    context = context or RunContext()
    run = Run(
        kind="pruned-checkpoint",
        command="prune",
        config=request.config,
        parameters=request.parameters(),
        seed=request.config.seed,
        inputs={"model": request.source, "calibration": request.calibration.source()},
        lineage=request.lineage,
    )
    if finished := run.finished(output):
        return finished
    check_output(output, [request.checkpoint.path])
    require_space(output.path.parent, int(request.checkpoint.bytes * (1 - request.config.sparsity)))
    with context.stopwatch("verifying"):
        calibration = request.calibration
        # what the model is going to write is not there yet
        corner = random_rows(request.checkpoint) if calibration.author else probe(request.checkpoint, calibration.known)
        verify_reading(request.checkpoint, corner, request.compute, context)
    with run.working(output) as work:
        rows = request.calibration.read(replace(context, state=findings or work.state))
        save_rows(rows, work.files)
        decision = decide(request, rows, replace(context, state=work.state), findings)
        if masks := decision.candidate.masks:
            proof = _put_cut(request, rows, masks, work, context)
        else:
            found = recover_into(work, refit_task(request, rows, decision), (), context)
            masks = found.outcome.masks
            proof = {"refit": found.report, "largest_logit_difference": found.largest_logit_difference}
        plan = plan_prune(request.checkpoint, masks, rows.length)
        save_file(decision.scores.tensors(), work.files / SCORES_NAME)
        summary = f"{request.method.name}, {plan.sparsity:.1%} of block parameters removed"
        return run.publish(work, summary, plan.report() | decision.report() | proof, context.stopwatch.measured())


def dry_run(request: PruneRequest, context: RunContext | None = None) -> Decision:
    """What a run would decide, as far as that can be told without writing anything, be it calibration text.

    Raises: what `decide` raises.
    """
    context = context or RunContext()
    if request.calibration.author:
        context.note(
            "The model writes no text in a dry run; builtin:python-docs stands in for it, so a run may choose "
            "otherwise."
        )
    return decide(request, request.calibration.stand_in(), context)


def _put_cut(
    request: PruneRequest, rows: TokenRows, masks: Masks, work: WorkDirectory, context: RunContext
) -> dict[str, JsonValue]:
    """Write the cut alone: it must compute what the dense model does with the removed units silenced."""
    checkpoint, compute = request.checkpoint, request.compute
    with context.stopwatch("writing"):
        write_cut(work.files, checkpoint, masks, context)
    with context.stopwatch("verifying"):
        tokens = probe(checkpoint, rows.tokens)
        expected = streamed_logits(checkpoint, tokens, masks, compute, context)
        return {"largest_logit_difference": verify_written(work.files, tokens, expected, compute, context)}


TURNS: Mapping[Effort, BranchTuning | None] = {
    Effort.fast: None,
    Effort.normal: BranchTuning(),
    Effort.best: BranchTuning(tokens=65_536),
}
"""How long the ends of a gated layer take turns."""


def refit_task(request: PruneRequest, rows: TokenRows, decision: Decision) -> RecoveryTask:
    """The cut of a method that chooses units as it fits what stays to the dense model's outputs."""
    fitting, judging = split_rows(rows.rows, held_out_rows(rows.rows))
    return RecoveryTask(
        teacher=request.checkpoint,
        tokens=rows.tokens,
        fit=Fit(fitting, judging, branches=TURNS[request.config.effort]),
        compute=request.compute,
        shapes=decision.candidate.shapes,
        opening=len(rows.frame.opening),
    )
