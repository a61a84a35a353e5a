"""A planned configuration as the `adapter_config.json` that PEFT loads."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from spinecli.checkpoints.family import Family
from spinecli.lora.factors import DEFAULT_SCALE
from spinecli.lora.peft_format import plain_config


def adapter_config(
    family: Family, base: str, targets: Sequence[str], ranks: Sequence[int], labels: int | None
) -> dict[str, JsonValue]:
    """LoRA in the last blocks of a model, each with its own rank.

    Written key by key instead of by PEFT, so that the bytes do not depend on its version.

    Args:
        base: the checkpoint as the user named it.
        targets: adapted projections, relative to a block.
        ranks: one per block, 0 where a block has no LoRA; at least one is not 0.
        labels: of a trained classification head, None without one.
    """
    container = family.blocks.rpartition(".")[2]
    held = {index: rank for index, rank in enumerate(ranks) if rank}
    pattern: dict[str, JsonValue] = {rf"{container}\.{index}\..+": rank for index, rank in held.items()}
    highest = max(held.values())
    return {
        **plain_config("CAUSAL_LM" if labels is None else "SEQ_CLS", base, highest, pattern, int(DEFAULT_SCALE)),
        "target_modules": list(targets),
        "exclude_modules": list(_also_matched(family, targets)) or None,
        "layers_to_transform": list(held),
        "layers_pattern": container,
        "modules_to_save": None if labels is None else [family.classification_head],
        "inference_mode": False,
    }


def _also_matched(family: Family, targets: Sequence[str]) -> tuple[str, ...]:
    """Projections that PEFT would adapt unasked, as it compares names from their end: BERT has two `output.dense`."""
    return tuple(
        name
        for name in family.projections
        if name not in targets and any(name.endswith(f".{target}") for target in targets)
    )
