"""`spine tune` as a library call: everything is checked before anything is computed, then the run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import JsonValue, ValidationError

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions, check_output, require_space
from spinecli.artifacts.manifest import MANIFEST_NAME, Manifest, Source, Step, expect_kind, lineage_behind
from spinecli.artifacts.run import Run
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions, compute_options
from spinecli.data.calibration import Calibration, kept_calibration, open_calibration
from spinecli.data.calibration_file import load_rows
from spinecli.data.config import CalibrationConfig, SpecialTokens
from spinecli.data.rows import TokenRows
from spinecli.errors import (
    DamagedArtifactError,
    ForeignArtifactError,
    MissingPathError,
    OfflineError,
    OptionError,
)
from spinecli.pruning.config import PruneConfig, TuneConfig, TuneMethod
from spinecli.pruning.recovery.block import Fit
from spinecli.pruning.recovery.gated_layer import BranchTuning
from spinecli.pruning.recovery.recover import RecoveryTask, held_out_rows, recover_into, split_rows


@dataclass(frozen=True, eq=False)
class TuneRequest:
    """A checked config with everything opened."""

    config: TuneConfig
    compute: ComputeOptions
    student: Checkpoint
    teacher: Checkpoint
    masks: Masks
    inputs: dict[str, Source]
    lineage: tuple[Step, ...]
    calibration: Calibration
    special_tokens: SpecialTokens
    bias_switches: tuple[str, ...]
    """Config keys that `mask+bias` turns on because the student's projections have no bias yet."""

    def task(self, rows: TokenRows) -> RecoveryTask:
        """What the recovery needs to know.

        Args:
            rows: what `calibration` gives.
        """
        method = self.config.method
        fitting, judging = split_rows(rows.rows, held_out_rows(rows.rows))
        branches = BranchTuning() if method is TuneMethod.auto else None
        return RecoveryTask(
            teacher=self.teacher,
            tokens=rows.tokens,
            fit=Fit(fitting, judging, method, branches=branches),
            compute=self.compute,
            pruned=(self.student, self.masks),
            opening=len(rows.frame.opening),
        )

    def parameters(self) -> dict[str, JsonValue]:
        """What decides the result, for `spine.json`."""
        return {
            **self.config.parameters(),
            "calibration_rows": self.calibration.rows,
            "calibration_length": self.calibration.length,
            "special_tokens": self.special_tokens.value,
        }


def open_request(config: TuneConfig) -> TuneRequest:
    """Find the dense teacher of a pruned checkpoint and check that everything fits together.

    Raises: ForeignArtifactError, DamagedArtifactError, MissingPathError, OptionError, and what reading can raise.
    """
    manifest = expect_kind(config.pruned, ("pruned-checkpoint",), "name the directory that spine prune wrote")
    if missing := {"model", "calibration"} - manifest.inputs.keys():
        place = config.pruned / MANIFEST_NAME
        raise DamagedArtifactError(f"{place} does not name its {' and '.join(sorted(missing))}; prune again.")
    student = Checkpoint.open(config.pruned)
    source = describe_source(str(config.pruned), config.pruned)
    lineage = lineage_behind(config.pruned, source)
    teacher, teacher_source = _teacher(config, manifest)
    masks = Masks.load(config.pruned)
    if not _lead_from(masks, teacher, student):
        raise DamagedArtifactError(f"The masks in {config.pruned} belong to another checkpoint; prune again.")
    wanted = _calibration(config, manifest)
    compute = compute_options(config.device, config.dtype)
    if config.calibration.text:
        model = teacher_source.model_copy(update={"reference": manifest.inputs["model"].reference})
        calibration = open_calibration(teacher, model, wanted, seed=config.seed, compute=compute)
    else:
        calibration = _kept(config, manifest, teacher)
    if calibration.rows < 2:
        raise OptionError("Tuning needs at least 2 calibration rows, one to fit and one to hold out; add rows.")
    return TuneRequest(
        config=config,
        compute=compute,
        student=student,
        teacher=teacher,
        masks=masks,
        inputs={"pruned": source, "dense": teacher_source, "calibration": calibration.source()},
        lineage=lineage,
        calibration=calibration,
        special_tokens=wanted.special_tokens,
        bias_switches=_bias_switches(config, student),
    )


def _lead_from(masks: Masks, teacher: Checkpoint, student: Checkpoint) -> bool:
    """Whether the masks cut the teacher to the student's blocks and shapes."""
    return masks.fit(teacher.shapes) and masks.shapes_after(teacher.shapes) == student.shapes


def _teacher(config: TuneConfig, manifest: Manifest) -> tuple[Checkpoint, Source]:
    """The dense checkpoint that was pruned: where it was, or where --dense says it is now."""
    recorded = manifest.inputs["model"]
    reference = config.dense or recorded.reference
    try:
        path = resolve_checkpoint(reference)
    except (MissingPathError, OfflineError) as error:
        if config.dense:
            raise
        raise MissingPathError(
            f"The dense checkpoint {reference} that {config.pruned} was made from does not exist; name it with --dense."
        ) from error
    source = describe_source(reference, path)
    if source.digest != recorded.digest:
        raise ForeignArtifactError(
            f"{reference} is not the checkpoint that {config.pruned} was made from; name that one with --dense."
        )
    return Checkpoint.open(path), source


def _kept(config: TuneConfig, manifest: Manifest, teacher: Checkpoint) -> Calibration:
    """The rows that the prune run calibrated on, or the first of them.

    Raises: DamagedArtifactError, OptionError if more is asked for.
    """
    rows, asked = load_rows(config.pruned, int(teacher.config.vocab_size)), config.calibration
    for option, wanted, has in (
        ("--calibration-rows", asked.rows, rows.rows),
        ("--calibration-length", asked.length, rows.length),
    ):
        if wanted is not None and wanted > has:
            raise OptionError(
                f"{option} {wanted} exceeds the {has} that {config.pruned} holds; name the text with --calibration."
            )
    if asked.special_tokens is not None:
        raise OptionError(
            f"--special-tokens belongs to --calibration; the rows in {config.pruned} begin as spine prune wrote them."
        )
    length = asked.length or rows.length
    if length <= rows.frame.size:
        raise OptionError(f"--calibration-length {length} has no room between the model's special tokens; raise it.")
    return kept_calibration(rows.first(asked.rows or rows.rows, length), manifest.inputs["calibration"].reference)


def _calibration(config: TuneConfig, manifest: Manifest) -> CalibrationConfig:
    """What text is read with, and how much of it: as the user says, otherwise as in the prune run."""
    try:
        recorded = PruneConfig.model_validate(manifest.config).calibration
    except ValidationError as error:
        raise DamagedArtifactError(
            f"{config.pruned / MANIFEST_NAME} does not say what its text was; prune again."
        ) from error
    asked = config.calibration
    return CalibrationConfig(
        text=asked.text,
        rows=asked.rows or recorded.rows,
        length=asked.length or recorded.length,
        special_tokens=asked.special_tokens or recorded.special_tokens,
    )


def _bias_switches(config: TuneConfig, student: Checkpoint) -> tuple[str, ...]:
    if config.method is not TuneMethod.mask_bias:
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


def tune(request: TuneRequest, output: OutputOptions, context: RunContext | None = None) -> Manifest:
    """Tune a pruned checkpoint into a new directory.

    If the tuned model as a whole is worse than the untuned one on held-out rows, the weights stay as they were and the
    report says so.

    Raises: OutputExistsError, UnfinishedRunError, NoSpaceError, VerificationError, and what reading can raise.
    """
    context, student = context or RunContext(), request.student
    run = Run(
        kind="tuned-checkpoint",
        command="tune",
        config=request.config,
        parameters=request.parameters(),
        seed=request.config.seed,
        inputs=request.inputs,
        lineage=request.lineage,
    )
    if finished := run.finished(output):
        return finished
    check_output(output, [student.path, request.teacher.path])
    require_space(output.path.parent, student.bytes)
    with run.working(output) as work:
        rows = request.calibration.read(replace(context, state=work.state))
        found = recover_into(work, request.task(rows), request.bias_switches, context)
        summary = f"{request.config.method.value}, {found.outcome.summary}"
        report = {**found.report, "largest_logit_difference": found.largest_logit_difference}
        return run.publish(work, summary, report, context.stopwatch.measured())
