"""Checkpoints as files for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from spinecli.exports.config import Quantization


def write_gguf_file(checkpoint: Path, file: Path, quantize: Quantization) -> Path:
    pytest.importorskip("gguf")
    from spinecli.evaluation.bench.models import convertible, open_models
    from spinecli.exports.gguf_file import write_gguf

    (model,) = open_models([str(checkpoint)])
    write_gguf(file, convertible(model, quantize).planned)
    return file
