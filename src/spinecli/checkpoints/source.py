"""From what a user types as MODEL to a directory: a path, a hub id, or `builtin:tiny`."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from spinecli.artifacts.manifest import Source, record_file
from spinecli.errors import MissingPathError, NotACheckpointError, OfflineError

_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
# README and licence travel with a checkpoint but decide nothing, so they are not part of its identity.
_IDENTITY = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "chat_template*",
    "*.jinja",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
)


def resolve_checkpoint(reference: str) -> Path:
    """The directory of a checkpoint reference; a hub id is downloaded into the hub's own cache.

    Raises: MissingPathError, NotACheckpointError, OfflineError.
    """
    if reference.startswith(_BUILTIN):
        return _builtin(reference.removeprefix(_BUILTIN))
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotACheckpointError(f"{path} is a file; name the checkpoint's directory.")
    if not _HUB_ID.match(reference):
        raise MissingPathError(f"{path} does not exist; name a checkpoint directory, a hub id or builtin:tiny.")
    return _download(reference)


def describe_source(reference: str, directory: Path) -> Source:
    """The identity of a checkpoint: sums of its weights, configuration and tokenizer. Reads every byte once."""
    names = sorted({path for pattern in (*_IDENTITY, *TOKENIZER_PATTERNS) for path in directory.glob(pattern)})
    return Source(reference=reference, files={path.name: record_file(path) for path in names if path.is_file()})


def _builtin(name: str) -> Path:
    assets = Path(str(resources.files("spinecli.demo") / "assets"))
    path = assets / name
    if name not in ("tiny",):
        raise MissingPathError(f"There is no {_BUILTIN}{name}; the built-in checkpoint is {_BUILTIN}tiny.")
    return path


def _download(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.safetensors", "additional_chat_templates/*.jinja", *TOKENIZER_PATTERNS]
    try:
        return Path(snapshot_download(reference, allow_patterns=patterns))
    except HfHubHTTPError as error:
        raise MissingPathError(
            f"{reference} is not a directory here, and the hub refuses it; check the name."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise OfflineError(
            f"{reference} is not a directory here, and the hub cannot be reached; name a local checkpoint directory."
        ) from error
