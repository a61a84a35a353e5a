"""`spine heal` as a library call: ask the teacher, train the student, prove, publish."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions, WorkDirectory, check_output, require_space, work_of
from spinecli.artifacts.manifest import Manifest, read_manifest
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import return_freed_memory
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import MASKS_NAME
from spinecli.checkpoints.stream.verify import probe, streamed_logits, verify_written
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.data.rows import TokenRows
from spinecli.healing.config import Loss
from spinecli.healing.distillation import Distillation, Lesson
from spinecli.healing.processes import Processes, together
from spinecli.healing.request import HealRequest
from spinecli.healing.student import Student
from spinecli.healing.targets import TargetCache, ask_teacher


def heal(
    request: HealRequest, output: OutputOptions, context: RunContext | None = None, shared: Path | None = None
) -> Manifest:
    """Heal a cut checkpoint into a new directory.

    If training does not lower the loss on held-out rows, the weights stay as they were and the report says so. Of
    several processes that were started together the first one writes, and all of them return what it wrote.

    Args:
        shared: where what the model writes and the teacher's answers are kept, for other runs on the same text; None:
            with the run.

    Raises: TrainingError, OutputExistsError, UnfinishedRunError, NoSpaceError, VerificationError, and what reading can
        raise.
    """
    context, student = context or RunContext(), request.student
    run = Run(
        kind="healed-checkpoint",
        command="heal",
        config=request.config,
        parameters=request.parameters(),
        seed=request.config.seed,
        inputs=request.inputs,
        lineage=request.lineage,
    )
    with together(request.config.device) as processes:
        if processes.agreed(processes.leads and run.finished(output) is not None):
            return read_manifest(output.path)
        check_output(output, [student.path, *([request.teacher.path] if request.teacher else [])])
        require_space(output.path.parent, student.bytes)
        with run.working(output) if processes.leads else nullcontext(work_of(output.path)) as work:
            context = replace(context, state=work.state)
            asking = replace(context, state=shared or work.state)
            rows = processes.leader_first(partial(request.text.read, asking))
            targets = _targets(request, rows, asking, processes)
            healed, report = _train(request, rows, targets, context, processes)
            if processes.leads:
                report["largest_logit_difference"] = _write(request, healed, rows, work, context)
                run.publish(work, _summary(request, report), report, context.stopwatch.measured())
        processes.wait()
        return read_manifest(output.path)


def _targets(request: HealRequest, rows: TokenRows, context: RunContext, processes: Processes) -> TargetCache | None:
    config = request.config.training
    if request.teacher is None or context.state is None:
        return None
    answers = ask_teacher(
        request.teacher, rows, config.top_k, config.temperature, request.compute, context.state, context, processes
    )
    return_freed_memory()
    return answers


def _train(
    request: HealRequest, rows: TokenRows, targets: TargetCache | None, context: RunContext, processes: Processes
) -> tuple[Checkpoint, dict[str, JsonValue]]:
    """The healed checkpoint, or the one that came in if that is better, and how it went."""
    config, compute, seed = request.config.training, request.compute, request.config.seed
    with context.stopwatch("computing"):
        student = Student(request.student, config, compute, seed)
        lesson = Lesson(rows, request.held_out, targets)
        training = Distillation(student, lesson, config, request.config.text.tokens, seed, processes)
        training.run(context)
        before = training.curve[0]
        student.settle()
        found = training.judge()
    after = found.of(config.loss)
    helps = after < before.held_out
    return student.healed() if helps else request.student, {
        "loss": config.loss.value,
        "held_out_before": before.held_out,
        "held_out_after": after if helps else before.held_out,
        "held_out_lm_before": before.held_out_lm,
        "held_out_lm_after": found.of(Loss.lm) if helps else before.held_out_lm,
        "kept": "healed" if helps else "as it was",
        "trained_parameters": sum(each.numel() for each in student.trained.values()),
        "steps": training.steps,
        "rows": {"trained on": lesson.trained_on, "held out": lesson.held_out, **rows.rows_by_kind},
        "curve": [each.model_dump() for each in training.curve],
    }


def _write(
    request: HealRequest, healed: Checkpoint, rows: TokenRows, work: WorkDirectory, context: RunContext
) -> float:
    """Write the checkpoint, read it again, and compare; the largest difference of a logit."""
    with context.stopwatch("writing"):
        write_checkpoint(work.files, healed.raw_config, healed.groups(), healed.path, context)
        if (masks := request.student.path / MASKS_NAME).is_file():
            shutil.copyfile(masks, work.files / MASKS_NAME)
    with context.stopwatch("verifying"):
        corner = probe(healed, rows.tokens)
        expected = streamed_logits(healed, corner, None, request.compute, context)
        return verify_written(work.files, corner, expected, request.compute, context)


def _summary(request: HealRequest, report: Mapping[str, JsonValue]) -> str:
    training = request.config.training
    loss = "KL divergence" if training.loss is Loss.kl else "loss"
    kept = "" if report["kept"] == "healed" else ", left as it was"
    before, after = report["held_out_before"], report["held_out_after"]
    return f"{training.train.value}, held-out {loss} {before:.4f} to {after:.4f}{kept}"
