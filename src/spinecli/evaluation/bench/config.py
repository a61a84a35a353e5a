"""What `spine bench` is asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from spinecli.config import Config, Device, Dtype, Option
from spinecli.evaluation.config import GenerationConfig, Several
from spinecli.exports.config import Quantization

Engine = Literal["torch", "llama.cpp"]


def _some(models: tuple[str, ...]) -> tuple[str, ...]:
    if not models:
        raise ValueError("names no model; name one or several.")
    return models


class BenchConfig(Config):
    """Which models to time, and in which engines."""

    models: Annotated[
        Several,
        AfterValidator(_some),
        Option(
            "Models to compare: directories, hub ids, builtin:tiny or .gguf files. Ratios are to the first one.",
            argument=True,
            decides=False,
        ),
    ]
    engine: Annotated[
        Literal["torch", "llama.cpp", "all"] | None,
        Option(
            "Engine that runs the models: torch, with transformers; llama.cpp, through llama-cpp-python; or all.",
            default="torch, and llama.cpp too if it is installed and --device is cpu",
        ),
    ] = None
    generation: Annotated[GenerationConfig, Option("What is timed.", panel="Speed")] = GenerationConfig()
    quantize: Annotated[
        Quantization,
        Option("Type of a checkpoint's matrices in llama.cpp: f32, f16, q8_0 or q4_0. A .gguf file stays as it is."),
    ] = Quantization.f16
    threads: Annotated[
        int | None, Field(ge=1), Option("Number of threads that each engine uses.", default="torch's choice")
    ] = None
    device: Annotated[
        Device, Option("Device for torch: cpu, cuda, cuda:1 or mps. llama.cpp uses the CPU.", decides=False)
    ] = "cpu"
    dtype: Annotated[Dtype, Option("Precision in which torch computes.")] = "float32"
