"""How models are benched; every figure can be traced to these."""

from __future__ import annotations

from typing import Literal

from spinecli.evaluation.record import Record
from spinecli.evaluation.settings import GenerationSettings

Engine = Literal["torch", "llama.cpp"]
Quantization = Literal["f32", "f16", "q8_0", "q4_0"]

ENGINES: tuple[Engine, ...] = ("torch", "llama.cpp")


class BenchSettings(Record):
    """One benchmark."""

    generation: GenerationSettings = GenerationSettings()
    device: str = "cpu"
    """Of torch. llama.cpp computes on the CPU."""
    dtype: str = "float32"
    """Of torch."""
    quantize: Quantization = "f16"
    """How weights are stored in the GGUF that llama.cpp gets of a checkpoint."""
    threads: int | None = None
    """Threads of either engine; None: as many as torch chooses."""
