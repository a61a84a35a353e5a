"""What `spine export` is asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from spinecli.config import Config, Model, Option


class Format(str, Enum):
    """What an export can be written as."""

    gguf = "gguf"
    """One file for llama.cpp and what is built on it."""
    hf = "hf"
    """A Hugging Face directory."""


class Quantization(str, Enum):
    """Storage of the matrices."""

    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"
    """32 values share a scale; 8.5 bits a value."""
    q4_0 = "q4_0"
    """32 values share a scale; 4.5 bits a value. Embedding and output head take q8_0."""


class ExportConfig(Config):
    """Which checkpoint to write, and in which form."""

    model: Model
    format: Annotated[
        Format, Option("Format to write: gguf, one file for llama.cpp, or hf, a plain Hugging Face directory.")
    ]
    adapter: Annotated[
        Path | None, Option("Directory of a PEFT adapter to merge into the weights first.", decides=False)
    ] = None
    quantize: Annotated[
        Quantization | None, Option("Type of the matrices in GGUF: f32, f16, q8_0 or q4_0.", default="f16")
    ] = None
