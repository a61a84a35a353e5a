"""SHA-256 sums of files and of structured values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import JsonValue

_CHUNK_BYTES = 4 << 20


def sha256_file(path: Path) -> str:
    """The SHA-256 sum of a file's bytes, in hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def sha256_value(value: JsonValue) -> str:
    """The SHA-256 sum of a JSON value in its canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
