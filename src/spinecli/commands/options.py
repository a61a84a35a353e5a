"""Options that mean the same in every command, so that they read the same."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Precisions that a command computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Out = Annotated[Path, typer.Option("--out", help="Directory to write; it appears whole or not at all.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0)]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, mps.")]
ComputeDtype = Annotated[Dtype, typer.Option("--dtype", help="Precision of the computation.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that a spine command wrote.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a killed run of the same command.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text to calibrate on: a .txt, .jsonl or .csv file, a hub data set, or builtin:python-docs. "
        "Default: a built-in model's own language, else text that every Python has.",
        show_default=False,
    ),
]
CalibrationRows = Annotated[int, typer.Option("--calibration-rows", help="Rows of calibration text.", min=1)]
CalibrationLength = Annotated[int, typer.Option("--calibration-length", help="Tokens per calibration row.", min=2)]
SpecialTokens = Annotated[
    str,
    typer.Option(
        "--special-tokens",
        help="auto: every row begins as the tokenizer begins a text, with <bos> for instance; none: with text.",
    ),
]
