"""From a device's answer to an update that a strategy may trust: asked for, well-formed, finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from spinecli.artifacts.record import FiniteRecord
from spinecli.checkpoints.masks import Masks
from spinecli.errors import MessageError
from spinecli.federation.bounds import Examples, Loss, Seconds
from spinecli.federation.client.device import importance_from, importance_shapes, mask_shapes, mask_tensors, masks_from
from spinecli.federation.client.wire import adapter_from, head_from, outputs_from
from spinecli.federation.engine import Reply
from spinecli.federation.messages import checked_header, require_moderate, require_shapes
from spinecli.federation.strategies.strategy import ClientUpdate, StrategyContext, TrainInstruction
from spinecli.lora.aggregation.contribution import Contribution


class Metrics(FiniteRecord):
    """What a device says of its round."""

    examples: Examples
    loss_before: Loss
    loss_after: Loss
    forward_seconds: Seconds
    backward_seconds: Seconds
    ratio: float = Field(default=0.0, ge=0, lt=1)


def checked_update(
    reply: Reply, instruction: TrainInstruction, setting: StrategyContext, before: Masks | None
) -> ClientUpdate:
    """Validate an answer against what was ordered.

    Args:
        before: the masks that the server last knew of this device; units that are gone there must stay gone.

    Raises: MessageError with what is wrong.
    """
    tensors = dict(reply.message.tensors)
    metrics = checked_header(Metrics, reply.message, "Its figures are")
    masks = _checked_masks(tensors, setting, before) if instruction.pruning else None
    carried = mask_shapes(setting.blocks, setting.cuts.dense) if masks else {}
    require_moderate({name: value for name, value in tensors.items() if name not in carried})
    rows, columns = setting.kept_units(masks)
    require_shapes(tensors, _expected(instruction, setting, rows, columns, with_masks=masks is not None))
    if instruction.shared_a:
        d_in = {name: projection.d_in for name, projection in setting.projections.items()}
        adapter = outputs_from(tensors, setting.config.seed, d_in)
    else:
        adapter = adapter_from(tensors)
    adapter = {name: adapter[name] for name in setting.projections if name in adapter}
    ratio = setting.cuts.ratio_of(setting.cuts.widths_of(masks)) if masks else 0.0
    if metrics.ratio != ratio:
        raise MessageError(f"Its ratio {metrics.ratio:g} is not the {ratio:g} of its masks.")
    weight = float(metrics.examples) if setting.config.train.weighting == "examples" else 1.0
    return ClientUpdate(
        device=reply.device,
        contribution=Contribution(adapter, weight, rows, columns),
        head=head_from(tensors),
        weight=weight,
        loss_before=metrics.loss_before,
        loss_after=metrics.loss_after,
        forward_seconds=metrics.forward_seconds,
        backward_seconds=metrics.backward_seconds,
        timing=reply.timing,
        ratio=ratio,
        masks=masks,
        importance=importance_from(tensors, setting.blocks) if masks else None,
        ranks=instruction.ranks,
    )


def _checked_masks(tensors: Mapping[str, Tensor], setting: StrategyContext, before: Masks | None) -> Masks:
    shapes = mask_shapes(setting.blocks, setting.cuts.dense)
    for name, shape in shapes.items():
        value = tensors.get(name)
        if value is None or value.dtype is not torch.bool or tuple(value.shape) != shape or not bool(value.any()):
            raise MessageError(f"{name} is missing or not a mask of {shape[0]} units.")
    masks = masks_from(dict(tensors), setting.blocks)
    try:
        setting.cuts.widths_of(masks)
    except ValueError as error:
        raise MessageError("Its masks leave blocks of different widths.") from error
    if before is not None:
        known = mask_tensors(before)
        if any(bool((tensors[name] & ~known[name]).any()) for name in shapes):
            raise MessageError("Its masks bring back units that it had cut.")
    return masks


def _expected(
    instruction: TrainInstruction,
    setting: StrategyContext,
    rows: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    *,
    with_masks: bool,
) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {f"head.{name}": tuple(value.shape) for name, value in setting.head.items()}
    for name, projection in setting.projections.items():
        rank = instruction.ranks[projection.block]
        if rank == 0:
            continue
        expected[f"lora.{name}.b"] = (len(rows[name]) if name in rows else projection.d_out, rank)
        if not instruction.shared_a:
            expected[f"lora.{name}.a"] = (rank, len(columns[name]) if name in columns else projection.d_in)
    if with_masks:
        blocks, dense = setting.blocks, setting.cuts.dense
        expected |= mask_shapes(blocks, dense) | importance_shapes(blocks, dense)
    return expected
