"""What a directory is, for a person or a program: its manifest, its blocks, its sums."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pydantic import JsonValue

from spinecli.artifacts.manifest import MANIFEST_NAME, damaged_files, read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import block_costs
from spinecli.checkpoints.cut_picture import block_cuts
from spinecli.checkpoints.masks import MASKS_NAME, Masks
from spinecli.checkpoints.tokenizer import require_fitting_tokenizer
from spinecli.errors import ForeignArtifactError, MissingPathError


def inspect_directory(directory: Path, *, verify: bool = False) -> dict[str, JsonValue]:
    """Describe an artifact or any checkpoint; weights are not read, except to verify sums.

    Args:
        verify: compare every file with its recorded sum; the differences come back under `damaged`.

    Raises: MissingPathError, ForeignArtifactError (neither an artifact nor a checkpoint, or nothing to verify against).
    """
    if not directory.is_dir():
        raise MissingPathError(f"{directory} is not a directory; name one that a spine command wrote, or a checkpoint.")
    found: dict[str, JsonValue] = {"directory": str(directory)}
    has_manifest = (directory / MANIFEST_NAME).is_file()
    if verify or has_manifest:
        manifest = read_manifest(directory)
        found["manifest"] = manifest.model_dump(mode="json")
        if verify:
            found["damaged"] = dict(damaged_files(directory, manifest))
    if (directory / "config.json").is_file() and not found.get("damaged"):
        found |= _describe_blocks(directory)
    elif not has_manifest:
        if (directory / "adapter_config.json").is_file():
            Checkpoint.open(directory)  # which says whose adapter it is
        raise ForeignArtifactError(
            f"{directory} has neither {MANIFEST_NAME} nor config.json: no spine artifact and no checkpoint."
        )
    return found


def _describe_blocks(directory: Path) -> dict[str, JsonValue]:
    checkpoint = Checkpoint.open(directory)
    require_fitting_tokenizer(checkpoint)
    masks = Masks.load(directory) if (directory / MASKS_NAME).is_file() else None
    origins = masks.kept_blocks if masks else list(range(checkpoint.blocks))
    blocks: list[JsonValue] = [
        {
            "index": index,
            "from": origin,
            "heads": checkpoint.shapes[index].heads,
            "kv_heads": checkpoint.shapes[index].kv_heads,
            "channels": checkpoint.shapes[index].channels,
            "parameters": block_costs(checkpoint, index).block,
        }
        for index, origin in enumerate(origins)
    ]
    return {
        "model_type": checkpoint.family.model_type,
        "task": checkpoint.task.value,
        "bytes": checkpoint.bytes,
        "blocks": blocks,
        "removed_blocks": list(masks.removed_blocks) if masks else [],
        "kept": [asdict(cut) for cut in block_cuts(masks)] if masks else None,
    }
