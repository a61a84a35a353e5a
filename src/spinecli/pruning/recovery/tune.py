"""`spine tune` as a library call: what it is asked for, checked before anything is computed, and the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from spinecli.artifacts.directory import OutputOptions, check_output, require_space
from spinecli.artifacts.manifest import MANIFEST_NAME, Manifest, Source, Step, expect_kind, lineage_behind
from spinecli.artifacts.run import Run
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.choice import choice
from spinecli.data.rows import CalibrationOptions, SpecialTokens, TokenRows, calibration_rows
from spinecli.errors import (
    DamagedArtifactError,
    ForeignArtifactError,
    MissingPathError,
    OfflineError,
    OptionError,
)
from spinecli.progress import Progress, silent
from spinecli.pruning.recovery.least_squares import TuneMethod
from spinecli.pruning.recovery.recover import RecoveryTask, held_out_rows, recover_into


@dataclass(frozen=True)
class TuneConfig:
    """The options of `spine tune`. What is None is taken from the prune run that made the input."""

    pruned: Path
    dense: str | None = None
    method: TuneMethod = TuneMethod.auto
    calibration_text: str | None = None
    calibration_rows: int | None = None
    calibration_length: int | None = None
    special_tokens: SpecialTokens | None = None
    seed: int = 0
    compute: ComputeOptions = field(default_factory=ComputeOptions)


@dataclass(frozen=True, eq=False)
class TuneRequest:
    """Checked options with everything opened."""

    options: TuneConfig
    student: Checkpoint
    teacher: Checkpoint
    masks: Masks
    inputs: dict[str, Source]
    lineage: tuple[Step, ...]
    calibration: TokenRows
    special_tokens: SpecialTokens
    bias_switches: tuple[str, ...]
    """Config keys that `mask+bias` turns on because the student's projections have no bias yet."""

    def task(self) -> RecoveryTask:
        """What the recovery needs to know."""
        return RecoveryTask(
            teacher=self.teacher,
            student=self.student,
            masks=self.masks,
            tokens=self.calibration.tokens,
            held_out_rows=held_out_rows(self.calibration.rows),
            method=self.options.method,
            compute=self.options.compute,
            opening=len(self.calibration.frame.opening),
        )

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        return {
            "method": self.options.method.value,
            "calibration_rows": self.calibration.rows,
            "calibration_length": self.calibration.length,
            "special_tokens": self.special_tokens.value,
            "dtype": str(self.options.compute.dtype).removeprefix("torch."),
        }


def open_request(options: TuneConfig) -> TuneRequest:
    """Find the dense teacher of a pruned checkpoint and check that everything fits together.

    Raises: ForeignArtifactError, DamagedArtifactError, MissingPathError, OptionError, and what reading can raise.
    """
    manifest = expect_kind(options.pruned, ("pruned-checkpoint",), "name the directory that spine prune wrote")
    if missing := {"model", "calibration"} - manifest.inputs.keys():
        place = options.pruned / MANIFEST_NAME
        raise DamagedArtifactError(f"{place} does not name its {' and '.join(sorted(missing))}; prune again.")
    student = Checkpoint.open(options.pruned)
    source = describe_source(str(options.pruned), options.pruned)
    lineage = lineage_behind(options.pruned, source)
    teacher, teacher_source = _teacher(options, manifest)
    masks = Masks.load(options.pruned)
    if not _lead_from(masks, teacher, student):
        raise DamagedArtifactError(f"The masks in {options.pruned} belong to another checkpoint; prune again.")
    wanted = _calibration(options, manifest)
    calibration = calibration_rows(teacher, manifest.inputs["model"].reference, wanted)
    if calibration.rows < 2:
        raise OptionError("Tuning needs at least 2 calibration rows, one to fit and one to judge; add rows.")
    return TuneRequest(
        options=options,
        student=student,
        teacher=teacher,
        masks=masks,
        inputs={"pruned": source, "dense": teacher_source, "calibration": calibration.source()},
        lineage=lineage,
        calibration=calibration,
        special_tokens=wanted.special_tokens,
        bias_switches=_bias_switches(options, student),
    )


def _lead_from(masks: Masks, teacher: Checkpoint, student: Checkpoint) -> bool:
    """Whether the masks cut the teacher to the student's blocks and shapes."""
    return masks.fit(teacher.shapes) and masks.shapes_after(teacher.shapes) == student.shapes


def _teacher(options: TuneConfig, manifest: Manifest) -> tuple[Checkpoint, Source]:
    """The dense checkpoint that was pruned: where it was, or where --dense says it is now."""
    recorded = manifest.inputs["model"]
    reference = options.dense or recorded.reference
    try:
        path = resolve_checkpoint(reference)
    except (MissingPathError, OfflineError) as error:
        if options.dense:
            raise
        raise MissingPathError(
            f"The dense checkpoint {reference} that {options.pruned} was made from is not there; name it with --dense."
        ) from error
    source = describe_source(reference, path)
    if source.digest != recorded.digest:
        raise ForeignArtifactError(
            f"{reference} is not the checkpoint that {options.pruned} was made from; name that one with --dense."
        )
    return Checkpoint.open(path), source


def _calibration(options: TuneConfig, manifest: Manifest) -> CalibrationOptions:
    """The prune run's own calibration, unless the user names another."""

    def recorded(key: str) -> int:
        value = manifest.parameters.get(key)
        if not isinstance(value, int):
            raise DamagedArtifactError(f"{options.pruned} does not say its {key}; prune again.")
        return value

    recorded_tokens = str(manifest.parameters.get("special_tokens", SpecialTokens.none.value))
    return CalibrationOptions(
        text=options.calibration_text or manifest.inputs["calibration"].reference,
        rows=options.calibration_rows or recorded("calibration_rows"),
        length=options.calibration_length or recorded("calibration_length"),
        special_tokens=options.special_tokens or choice("special_tokens", SpecialTokens, recorded_tokens),
    )


def _bias_switches(options: TuneConfig, student: Checkpoint) -> tuple[str, ...]:
    if options.method is not TuneMethod.mask_bias:
        return ()
    family = student.family
    missing = []
    for group, output in (("attention", family.attention.output), ("feed_forward", family.feed_forward.output)):
        if f"{student.block_prefix(0)}{output}.bias" in student.tensors:
            continue
        if group not in family.output_bias_switches:
            raise OptionError(
                f"The plain {family.model_type} format has no bias on {output}; use --method mask, lsq or auto."
            )
        missing.append(family.output_bias_switches[group])
    return tuple(missing)


def tune(
    request: TuneRequest, output: OutputOptions, stopwatch: Stopwatch | None = None, progress: Progress = silent
) -> Manifest:
    """Tune a pruned checkpoint into a new directory.

    If the tuned model as a whole is worse than the untuned one on held-out rows, the weights stay as they were and the
    report says so.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, VerificationError, and what reading can raise.
    """
    stopwatch = stopwatch or Stopwatch()
    student = request.student
    run = Run(
        kind="tuned-checkpoint",
        command="tune",
        parameters=request.parameters(),
        seed=request.options.seed,
        inputs=request.inputs,
        lineage=request.lineage,
    )
    if finished := run.finished(output):
        return finished
    check_output(output, [student.path, request.teacher.path])
    require_space(output.path.parent, student.bytes)
    with run.working(output) as work:
        found = recover_into(work, request.task(), request.bias_switches, stopwatch, progress)
        summary = f"{request.options.method.value}, {found.outcome.summary}"
        report = {**found.report, "largest_logit_difference": found.largest_logit_difference}
        return run.publish(work, summary, report, stopwatch.measured())
