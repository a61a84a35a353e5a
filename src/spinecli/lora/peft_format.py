"""A trained adapter as a directory that plain PEFT opens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor

from spinecli.lora.factors import Adapter

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of every tensor."""


def save_adapter(
    directory: Path,
    adapter: Adapter,
    head: Mapping[str, Tensor],
    head_modules: Sequence[str],
    base: str,
    task_type: str,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    The factors carry their scale in B, so alpha equals the rank everywhere and PEFT multiplies by one.

    Args:
        head: trained tensors outside the blocks by full name; empty without any.
        head_modules: the modules that they are in.
        base: the checkpoint as the user named it.
        task_type: PEFT's, `SEQ_CLS` or `CAUSAL_LM`.
    """
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = factors.a.contiguous()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = factors.b.contiguous()
    tensors |= {PEFT_PREFIX + name: value.contiguous() for name, value in head.items()}
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    ranks = {name: factors.rank for name, factors in adapter.items()}
    config = adapter_config(ranks, base, task_type, head_modules)
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_config(
    ranks: Mapping[str, int], base: str, task_type: str, modules_to_save: Sequence[str]
) -> dict[str, JsonValue]:
    """PEFT's configuration of an adapter that has `ranks` by full name of the projection.

    The commonest rank is `r`; the others stand in `rank_pattern` under the projection's full name. Written key by key,
    so that the bytes do not depend on PEFT's version.
    """
    counts = Counter(ranks.values())
    common = max(counts, key=lambda rank: (counts[rank], rank))  # of equally common ones the highest, in any order
    pattern: dict[str, JsonValue] = {name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != common}
    return {
        **plain_config(task_type, base, common, pattern, 1),
        "target_modules": list[JsonValue](sorted(ranks)),
        "modules_to_save": list[JsonValue](modules_to_save) or None,
        "inference_mode": True,
    }


def plain_config(
    task_type: str, base: str, rank: int, pattern: Mapping[str, JsonValue], scale: int
) -> dict[str, JsonValue]:
    """What every LoRA configuration of this project says, with alpha / rank = `scale` in every projection.

    Args:
        pattern: ranks that differ from `rank`, by PEFT's pattern of a projection's name.
    """
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": dict(pattern),
        "alpha_pattern": {name: scale * int(str(each)) for name, each in pattern.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }
