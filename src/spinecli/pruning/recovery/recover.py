"""Recovering a student: dense teacher and pruned student streamed together, one answer a projection."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import WorkDirectory
from spinecli.artifacts.whole_file import whole_file
from spinecli.checkpoints.checkpoint import Checkpoint, config_from
from spinecli.checkpoints.cutting import cut_checkpoint
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.skeleton import build_skeleton, stored_shapes
from spinecli.checkpoints.stream.block_stream import BlockStream, ComputeOptions
from spinecli.checkpoints.stream.objective import Objective, objective_of
from spinecli.checkpoints.stream.observation import masked
from spinecli.checkpoints.stream.verify import probe, streamed_logits, verify_written
from spinecli.checkpoints.tensors import ComputedTensor
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.pruning.recovery.block import Fit, FittedBlock, StudentBlock, TeacherTargets, fit_block
from spinecli.pruning.recovery.least_squares import LayerRecovery
from spinecli.pruning.recovery.walk import walk

_HEADS, _CHANNELS = "kept heads", "kept channels"


@dataclass(frozen=True)
class TunedWeights:
    """Answers by block of the student, in the dtype in which they will be stored."""

    directory: Path

    def save(self, index: int, dense_index: int, tuned: FittedBlock, student: Checkpoint) -> None:
        """Keep what was found for block `index` of the student, which was block `dense_index` of the teacher."""
        tensors: dict[str, Tensor] = {}
        layers: list[JsonValue] = []
        for name, layer in tuned.layers(student.family).items():
            weight, bias = layer.solution.weight, layer.solution.bias
            stored = weight.T if student.family.transposed else weight
            tensors[f"{name}.weight"] = stored.to("cpu", student.storage_dtype).contiguous()
            if bias is not None:
                tensors[f"{name}.bias"] = bias.to("cpu", student.storage_dtype)
            if layer.solution.scales is not None:
                tensors[f"{name}.scales"] = layer.solution.scales.cpu()
            layers.append(_layer_report(index, dense_index, name, layer))
        if tuned.mask is not None:
            tensors |= {_HEADS: tuned.mask.heads, _CHANNELS: tuned.mask.channels}
        with whole_file(self._path(index)) as part:
            save_file(tensors, part, metadata={"layers": json.dumps(layers)})

    def report(self, index: int) -> list[JsonValue]:
        """What was chosen for the layers of block `index`, and what it was worth."""
        with safe_open(self._path(index), framework="pt") as handle:
            layers: list[JsonValue] = json.loads(handle.metadata()["layers"])
            return layers

    def names(self, index: int) -> list[str]:
        """Names of the tensors kept for block `index`, relative to the block."""
        with safe_open(self._path(index), framework="pt") as handle:
            return sorted(set(handle.keys()) - {_HEADS, _CHANNELS})

    def mask(self, index: int) -> BlockMask:
        """What is kept of the dense block that became block `index`, if that was found with the answers."""
        return BlockMask(self.read(index, _HEADS), self.read(index, _CHANNELS))

    def read(self, index: int, name: str) -> Tensor:
        """One of them."""
        with safe_open(self._path(index), framework="pt") as handle:
            value: Tensor = handle.get_tensor(name)
            return value

    def scales(self, blocks: int) -> dict[str, Tensor]:
        """Scales of every layer that got a mask, by `block.<index>.<projection>`."""
        return {
            f"block.{index}.{name.removesuffix('.scales')}": self.read(index, name)
            for index in range(blocks)
            for name in self.names(index)
            if name.endswith(".scales")
        }

    def _path(self, index: int) -> Path:
        return self.directory / f"tuned-{index:05d}.safetensors"


def tuned_checkpoint(student: Checkpoint, tuned: TunedWeights, bias_switches: tuple[str, ...]) -> Checkpoint:
    """The student with the answers in place of its own projections; they are read from their files as they are needed.

    Biases that a switch brings into being and that no answer fills are zero.
    """
    raw_config = {**student.raw_config, **dict.fromkeys(bias_switches, True)}
    config, dtype = config_from(raw_config), student.storage_dtype
    expected = stored_shapes(build_skeleton(config, student.task))
    answers: dict[str, Callable[[], Tensor]] = {
        f"{student.block_prefix(index)}{name}": partial(tuned.read, index, name)
        for index in range(student.blocks)
        for name in tuned.names(index)
    }
    tensors = dict(student.tensors)
    for name, shape in expected.items():
        if name in answers:
            tensors[name] = ComputedTensor(shape, dtype, answers[name])
        elif name not in tensors:
            tensors[name] = ComputedTensor(shape, dtype, partial(torch.zeros, shape, dtype=dtype))
    return replace(student, raw_config=raw_config, config=config, tensors=tensors)


def _layer_report(index: int, dense_index: int, name: str, layer: LayerRecovery) -> JsonValue:
    return {
        "block": index,
        "dense_block": dense_index,
        "layer": name,
        "choice": layer.choice,
        "error_before": layer.error_before,
        "error_after": layer.error_after,
    }


SCALES_NAME = "scales.safetensors"


@dataclass(frozen=True, eq=False)
class RecoveryOutcome:
    """What tuning did to the model as a whole, on calibration rows that nothing was fitted to."""

    objective: Objective
    before: Tensor
    """What the objective says of the student as it was, (judging rows,); the lower the better."""
    after: Tensor
    """The same of the tuned student."""
    student: Checkpoint
    """As it was."""
    masks: Masks
    """What it keeps of the teacher."""
    logits: Tensor
    """The tuned student's answers to the probe tokens; see `BlockStream.logits`."""

    @property
    def helps(self) -> bool:
        """Whether the tuned model is the better one."""
        return float(self.after.mean()) < float(self.before.mean())

    @property
    def summary(self) -> str:
        """For a person, in a few words."""
        before = f"held-out {self.objective.key} {float(self.before.mean()):.4f}"
        return f"{before} to {float(self.after.mean()):.4f}" if self.helps else f"{before}, left untuned"

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        return {
            "judged_by": self.objective.name,
            "held_out_before": float(self.before.mean()),
            "held_out_after": float(self.after.mean()),
            "kept": "tuned" if self.helps else "untuned",
        }


@dataclass(frozen=True, eq=False)
class RecoveryTask:
    """Who is to be recovered, and from what."""

    teacher: Checkpoint
    tokens: Tensor
    """(rows, length)."""
    fit: Fit
    compute: ComputeOptions
    pruned: tuple[Checkpoint, Masks] | None = None
    """The student, and what it keeps of the teacher, if it is cut already."""
    shapes: Sequence[BlockShape] = ()
    """Otherwise how much of each of the teacher's blocks is to be kept; which units, the walk finds."""
    opening: int = 0
    """Special tokens in front of every row."""

    @property
    def kept(self) -> list[bool]:
        """Of every block of the teacher, whether it stays."""
        if self.pruned:
            return [mask.kept for mask in self.pruned[1].blocks]
        return [bool(shape.heads or shape.channels) for shape in self.shapes]


def split_rows(rows: int, judging: int) -> tuple[Tensor, Tensor]:
    """Which rows are fitted to, and which judge: the last ones; (rows,) bool each."""
    last = torch.arange(rows) >= rows - judging
    return ~last, last


def held_out_rows(rows: int) -> int:
    """How many of the calibration rows choose between answers: an eighth."""
    return max(1, rows // 8)


def recover_student(task: RecoveryTask, tuned: TunedWeights, context: RunContext | None = None) -> RecoveryOutcome:
    """Walk teacher and student block by block and leave the answers in `tuned`.

    Three streams are carried: the teacher's, the tuned student's, and, on the judging rows, that of the student as it
    was, for the final comparison.
    """
    context = context or RunContext()
    tokens, length, judging = task.tokens, task.tokens.shape[1], task.fit.judging
    teacher = BlockStream(task.teacher, length, task.compute, context, task.opening)
    source = task.pruned[0] if task.pruned else task.teacher
    student = BlockStream(source, length, task.compute, context, task.opening) if task.pruned else teacher
    kept = [dense for dense, stays in enumerate(task.kept) if stays]
    streams: dict[str, Tensor] = {}

    def follow(dense: int, targets: TeacherTargets, _: Sequence[int]) -> None:
        index = kept.index(dense)
        with student.block(index if task.pruned else dense) as block:
            if task.pruned:
                streams["as it was"] = student.run(block, streams["as it was"])
                asked = StudentBlock(block, streams["student"])
                found = fit_block(student, asked, targets, task.fit, source.storage_dtype)
            else:
                asked = StudentBlock(block, streams["student"], shape=task.shapes[dense])
                found = fit_block(student, asked, targets, task.fit, source.storage_dtype)
                assert found.mask is not None
                with masked(block, source.family, source.shapes[dense], found.mask):
                    streams["as it was"] = student.run(block, streams["as it was"])
        tuned.save(index, dense, found, source)
        streams["student"] = found.hidden

    with context.stopwatch("computing"):
        streams["student"] = student.embed(tokens)
        streams["as it was"] = streams["student"][judging]
        start = teacher.embed(tokens) if task.pruned else streams["student"]
        dense = walk(teacher, start, [task.kept], streams, follow, "tuning", context)
        objective = objective_of(source)
        compared = {"before": streams["as it was"], "after": streams["student"][judging]}
        measured = objective.measure(student, compared, dense[judging])
        corner = probe(source, streams["student"])
        logits = torch.cat(list(student.logits(corner))).cpu()
    found, masks = task.pruned or _cut(task, tuned)
    return RecoveryOutcome(objective, measured["before"], measured["after"], found, masks, logits)


def _cut(task: RecoveryTask, tuned: TunedWeights) -> tuple[Checkpoint, Masks]:
    """The student that the walk has made, without its answers, and its masks."""
    masks = []
    index = 0
    for shape, stays in zip(task.teacher.shapes, task.kept, strict=True):
        if stays:
            masks.append(tuned.mask(index))
            index += 1
        else:
            nothing = [torch.zeros(units, dtype=torch.bool) for units in (shape.heads, shape.channels)]
            masks.append(BlockMask(*nothing))
    found = Masks(tuple(masks))
    return cut_checkpoint(task.teacher, found), found


@dataclass(frozen=True, eq=False)
class Recovered:
    """A recovery that is written and proved."""

    outcome: RecoveryOutcome
    report: dict[str, JsonValue]
    """For `spine.json` and --json: what it did to the model, and to each layer."""
    largest_logit_difference: float
    """Between the written checkpoint and the intended one."""


def recover_into(work: WorkDirectory, task: RecoveryTask, switches: tuple[str, ...], context: RunContext) -> Recovered:
    """Write the recovered student, or the student as it was if the recovery did not help, with masks and scales.

    Args:
        switches: config keys that turn on biases which the answers bring.

    Raises: NoSpaceError; VerificationError, and then the checkpoint must not be published.
    """
    tuned = TunedWeights(work.state)
    outcome = recover_student(task, tuned, replace(context, state=work.state))
    found = tuned_checkpoint(outcome.student, tuned, switches) if outcome.helps else outcome.student
    with context.stopwatch("writing"):
        write_checkpoint(work.files, found.raw_config, found.groups(), found.path, context)
        outcome.masks.save(work.files)
        if outcome.helps and (scales := tuned.scales(found.blocks)):
            save_file(scales, work.files / SCALES_NAME)
    with context.stopwatch("verifying"):
        tokens, logits = probe(found, task.tokens), outcome.logits
        if not outcome.helps:
            logits = streamed_logits(outcome.student, tokens, None, task.compute, context)
        difference = verify_written(work.files, tokens, logits, task.compute, context)
    layers = [layer for index in range(found.blocks) for layer in tuned.report(index)]
    return Recovered(outcome, {**outcome.report(), "layers": layers}, difference)
