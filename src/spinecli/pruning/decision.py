"""What to cut: scores, then the ways to spend the budget, compared by what they are worth after a recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import JsonValue

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import ModelSize, size_of
from spinecli.checkpoints.cutting import cut_checkpoint
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.checkpoints.stream.objective import Objective, objective_of
from spinecli.data.rows import TokenRows
from spinecli.errors import OptionError, UnexportableError
from spinecli.exports.gguf_shape import gguf_shape_of
from spinecli.pruning.adaptive.allocation import AdaptiveBudget, allocate_adaptively
from spinecli.pruning.adaptive.damage import DamageCurve, Sensitivity, damage_curve, tempered
from spinecli.pruning.adaptive.sensitivity import sensitivities
from spinecli.pruning.allocation import (
    Allocation,
    allocate_blocks,
    allocate_share,
    block_candidates,
    head_candidates,
    last_of_their_kind,
    select_shapes,
    shapes_after,
)
from spinecli.pruning.config import Effort
from spinecli.pruning.request import PruneRequest
from spinecli.pruning.scoring import Scores, score_checkpoint
from spinecli.pruning.search import Candidate, CandidateScore, score_candidates, search_rows


def engines(cut: Checkpoint) -> dict[str, str]:
    """Engine or precision -> "yes", or why not; `spine export` decides the same way."""
    found = {"transformers": "with trust_remote_code=True" if cut.family.modelling_file else "yes"}
    try:
        shapes = gguf_shape_of(cut).shapes
    except UnexportableError as error:
        return found | {"llama.cpp": f"no: {error.reason}"}
    found["llama.cpp f16"] = "yes"
    widths = {cut.d_model} | {width for shape in shapes for width in (shape.heads * shape.head_dim, shape.channels)}
    for name, multiple in (("llama.cpp Q8_0, Q4_0", 32), ("llama.cpp K-quants", 256)):
        ragged = sorted(width for width in widths if width % multiple)
        found[name] = f"no: {ragged[0]} is not a multiple of {multiple}" if ragged else "yes"
    return found


@dataclass(frozen=True, eq=False)
class PrunePlan:
    """Masks and what follows from them."""

    masks: Masks
    dense: ModelSize
    cut: ModelSize
    dense_shapes: tuple[BlockShape, ...]
    """Of every block before the cut."""
    shapes: tuple[BlockShape, ...]
    """Of every kept block, after it."""
    model_type: str
    """Family the result is written as."""
    engines: dict[str, str]
    """Engine -> "yes", or what stands in the way."""

    @property
    def sparsity(self) -> float:
        """Achieved share of block parameters removed."""
        return 1 - self.cut.block_parameters / self.dense.block_parameters

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        return {
            "achieved_sparsity": self.sparsity,
            "removed_blocks": list(self.masks.removed_blocks),
            "removed_by_block": [
                {
                    "block": index,
                    "kv_heads": (~mask.kv_heads(shape)).nonzero().flatten().tolist(),
                    "channels": int((~mask.channels).sum()),
                }
                for index, (mask, shape) in enumerate(zip(self.masks.blocks, self.dense_shapes, strict=True))
            ],
            "shapes_before": [asdict(shape) for shape in self.dense_shapes],
            "shapes_after": [asdict(shape) for shape in self.shapes],
            "model_type": self.model_type,
            **self.sizes(),
        }

    def sizes(self) -> dict[str, JsonValue]:
        """What the cut model is, whichever units it keeps."""
        return {"dense": asdict(self.dense), "cut": asdict(self.cut), "engines": dict(self.engines)}


def plan_prune(checkpoint: Checkpoint, masks: Masks, length: int) -> PrunePlan:
    """Derive the plan of a cut.

    Args:
        length: tokens per calibration row, at which the FLOPs of attention scores are counted.
    """
    cut = cut_checkpoint(checkpoint, masks)
    return PrunePlan(
        masks=masks,
        dense=size_of(checkpoint, length),
        cut=size_of(cut, length),
        dense_shapes=checkpoint.shapes,
        shapes=cut.shapes,
        model_type=cut.family.model_type,
        engines=engines(cut),
    )


def planned(request: PruneRequest, decision: Decision) -> PrunePlan:
    """The plan of a cut that has not been made: where its units are chosen later, any are taken in their place."""
    checkpoint, shapes = request.checkpoint, decision.candidate.shapes
    masks = decision.candidate.masks or any_masks(checkpoint.shapes, shapes)
    return plan_prune(checkpoint, masks, request.calibration.length)


def any_masks(before: Sequence[BlockShape], after: Sequence[BlockShape]) -> Masks:
    """Masks that keep the first units of every block, as many as `after` says."""
    return Masks(
        tuple(
            BlockMask(torch.arange(dense.heads) < kept.heads, torch.arange(dense.channels) < kept.channels)
            for dense, kept in zip(before, after, strict=True)
        )
    )


# How far the measured differences between blocks are followed: damages of single cuts do not simply add up.
STRENGTHS = (1.0, 0.7, 0.5)


def adaptive_candidates(
    budget: AdaptiveBudget,
    scores: Scores,
    measured: Mapping[tuple[int, str], Sensitivity],
    removed: Sequence[frozenset[int]],
) -> list[Candidate]:
    """Every strength with every set of blocks that leave as a whole; those that come out alike are named once.

    Args:
        scores: of a method that knows what the loss of units costs.
    """
    curves = damage_curves(budget, scores, measured)
    found: dict[object, Candidate] = {}
    for gone in dict.fromkeys(removed):
        for strength in STRENGTHS:
            allocation = allocate_adaptively(budget, tempered(curves, strength), gone, strength)
            if allocation and any(shape.heads or shape.channels for shape in allocation.shapes):
                found.setdefault(allocation.shapes, Candidate(allocation, allocation.shapes))
    return list(found.values())


def damage_curves(
    budget: AdaptiveBudget, scores: Scores, measured: Mapping[tuple[int, str], Sensitivity]
) -> list[DamageCurve]:
    """Of every sub-layer that a block has.

    Raises: ValueError if the scores come from a method that does not know the units' errors.
    """
    curves = []
    for (block, sub_layer), sensitivity in sorted(measured.items()):
        units, costs = scores.units[block], budget.costs[block]
        attention = sub_layer == "attention"
        errors = units.kv_group_errors if attention else units.channel_errors
        if errors is None:
            raise ValueError("the scores do not say what the loss of units costs")
        unit = costs.kv_group if attention else costs.channel
        curves.append(damage_curve(block, sub_layer, errors, unit, sensitivity))
    return curves


# Share of the block parameters by which a cut may miss the asked sparsity and still be compared with others.
_SHORTFALL = 0.005


@dataclass(frozen=True, eq=False)
class Decision:
    """How much of every block is to be kept, and on what grounds."""

    scores: Scores
    candidate: Candidate
    scored: tuple[CandidateScore, ...]
    """Of every allocation that was compared; empty if there was nothing to compare."""
    objective: Objective
    """By which they were compared."""
    kept_for_their_kind: dict[int, str]
    """Blocks that stay as the last with their kind of attention -> that kind."""
    calibration: dict[str, int]
    """Kind of text -> number of rows."""

    def report(self) -> dict[str, JsonValue]:
        """For `spine.json` and --json."""
        return {
            "calibration": dict(self.calibration),
            "kept_for_their_kind": {str(index): kind for index, kind in self.kept_for_their_kind.items()},
            "block_influence": self.scores.influence.tolist(),
            "compared_by": self.objective.name,
            "compared": [{**each.allocation.report(), "held_out": each.held_out} for each in self.scored],
        }


# Shares of the budget that are spent on blocks, and then head factors, that are compared with each other.
COMPARED: Mapping[Effort, tuple[tuple[float, ...], tuple[float, ...]]] = {
    Effort.normal: ((0.0, 0.25, 0.5), (0.5, 1.0, 1.5)),
    Effort.best: ((0.0, 0.25, 0.5, 0.75, 1.0), (0.5, 1.0, 1.5)),
}


def decide(
    request: PruneRequest, rows: TokenRows, context: RunContext | None = None, findings: Path | None = None
) -> Decision:
    """Score the checkpoint and choose how much of every block stays; writes nothing but its own state.

    Args:
            rows: what `request.calibration` gives, or stands in for it.
        findings: directory for what does not depend on the sparsity, to be shared by runs that score alike and differ
            in nothing else but the sparsity; None keeps it with the context's.

    Raises: OptionError if nothing can be removed, or not as much as is asked for.
    """
    context = context or RunContext()
    shared = replace(context, state=findings or context.state)
    checkpoint, calibration = request.checkpoint, rows
    opening = len(calibration.frame.opening)
    stream = BlockStream(checkpoint, calibration.length, request.compute, context, opening)
    scored_on = calibration.tokens
    if request.scoring is not request.method:  # where blocks are all that is scored, fewer rows are enough
        scored_on = scored_on[: sum(search_rows(calibration.rows, calibration.length))]
    scores = score_checkpoint(stream, scored_on, request.scoring, shared)
    last = last_of_their_kind(scores.influence, checkpoint.attention_kinds, request.protected)
    protected = request.protected | last.keys()

    def compared(candidates: Sequence[Candidate], phase: str) -> list[CandidateScore]:
        return score_candidates(stream, calibration.tokens, candidates, phase, context)

    def uniform(allocation: Allocation) -> Candidate:
        shapes = shapes_after(scores, allocation, protected)
        masks = None if request.method.refits else select_shapes(scores, shapes, checkpoint.shapes)
        return Candidate(allocation, shapes, masks)

    scored: list[CandidateScore] = []
    chosen = [uniform(fixed)] if (fixed := _fixed_allocation(request)) else []
    if request.budget and request.searches:
        shares, factors = COMPARED[request.config.effort]
        scored += compared([uniform(each) for each in block_candidates(request.budget, shares)], "comparing blocks")
        best = _best(scored).allocation
        assert isinstance(best, Allocation)
        if others := head_candidates(request.budget, best, factors):
            scored += compared([uniform(each) for each in others], "comparing heads")
        chosen = [_best(scored)]
    if request.adaptive:
        measured = sensitivities(stream, calibration.tokens, scores, shared)
        removed = [frozenset(index for index, kept in enumerate(each.kept) if not kept) for each in chosen]
        budget = replace(request.adaptive, protected=protected)
        candidates = adaptive_candidates(budget, scores, measured, [frozenset(), *removed])
        unjudged = [] if scored else chosen
        scored += compared([*unjudged, *candidates], "comparing widths")
        if not scored:
            raise OptionError(
                f"Sparsity {request.config.sparsity:g} cannot be met with the blocks' own widths; lower --sparsity, "
                "--round-to or the number of blocks that --protect names."
            )
        chosen = [_best(_meeting(scored, request.config.sparsity))]
    if chosen[0].allocation.sparsity <= 0:
        raise OptionError(
            f"Sparsity {request.config.sparsity:g} is less than the smallest unit that can be removed; "
            "raise --sparsity or lower --round-to."
        )
    return Decision(scores, chosen[0], tuple(scored), objective_of(checkpoint), last, calibration.rows_by_kind)


def possible_allocations(request: PruneRequest) -> list[Allocation]:
    """Those with equal widths that a run would choose from, without a look at any token."""
    if fixed := _fixed_allocation(request):
        return [fixed]
    if request.budget is None:
        return []
    shares, factors = COMPARED[request.config.effort]
    found = block_candidates(request.budget, shares)
    others = [other for each in found for other in head_candidates(request.budget, each, factors)]
    return list(dict.fromkeys([*found, *others]))


def sizes_after(request: PruneRequest, allocation: Allocation) -> PrunePlan:
    """The plan of a cut whose units and blocks are not known yet: any are taken in their place."""
    checkpoint = request.checkpoint
    nothing = BlockShape(0, 0, allocation.shape.head_dim, 0)
    kept = [index for index in range(checkpoint.blocks) if index in request.protected]
    kept += [index for index in range(checkpoint.blocks) if index not in request.protected]
    stay = set(kept[: checkpoint.blocks - allocation.removed_blocks])
    shapes = [allocation.shape if index in stay else nothing for index in range(checkpoint.blocks)]
    return plan_prune(checkpoint, any_masks(checkpoint.shapes, shapes), request.calibration.length)


def _fixed_allocation(request: PruneRequest) -> Allocation | None:
    """The uniform allocation that the options ask for; None if it is to be found by comparison."""
    if request.budget is None:
        return None
    if not request.method.cuts_units:
        return allocate_blocks(request.budget)
    if request.searches:
        return None
    if request.splits and request.config.block_share == "auto":
        return block_candidates(request.budget, (0.0,))[0]
    blocks_leave = request.method.cuts_blocks
    wanted = request.config.block_share
    share = wanted if blocks_leave and wanted != "auto" else None
    return allocate_share(request.budget, share or 0.0, blocks_leave=blocks_leave)


def _meeting(scored: Sequence[CandidateScore], sparsity: float) -> Sequence[CandidateScore]:
    """Those that remove what was asked for: equal widths may fall short of it by whole units, and then lose less."""
    met = [each for each in scored if each.allocation.sparsity >= sparsity - _SHORTFALL]
    return met or scored


def _best(scored: Sequence[CandidateScore]) -> Candidate:
    """The candidate with the lowest loss; the first of equals."""
    return min(scored, key=lambda each: each.held_out).candidate
