"""A planned configuration as the `adapter_config.json` that PEFT loads."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from spinecli.checkpoints.family import Family

SCALE = 2
"""alpha / rank, the same in every block, so that a block's learning rate does not depend on its rank."""


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
    pattern = {rf"{container}\.{index}\..+": rank for index, rank in held.items()}
    highest = max(held.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if labels is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": highest,
        "lora_alpha": SCALE * highest,
        "rank_pattern": dict(pattern),
        "alpha_pattern": {block: SCALE * rank for block, rank in pattern.items()},
        "target_modules": list(targets),
        "exclude_modules": list(_also_matched(family, targets)) or None,
        "layers_to_transform": list(held),
        "layers_pattern": container,
        "modules_to_save": None if labels is None else [family.classification_head],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": False,
    }


def _also_matched(family: Family, targets: Sequence[str]) -> tuple[str, ...]:
    """Projections that PEFT would adapt unasked, as it compares names from their end: BERT has two `output.dense`."""
    everything = (*family.attention.projections, *family.feed_forward.inputs, family.feed_forward.output)
    return tuple(
        name for name in everything if name not in targets and any(name.endswith(f".{target}") for target in targets)
    )
