"""What `spine prune` and `spine tune` are asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from spinecli.checkpoints.shape import Heads
from spinecli.config import Config, Device, Dtype, Model, Option, RoundTo, Seed, Sparsity
from spinecli.data.config import CALIBRATION, CalibrationConfig, SpecialTokens


class Widths(str, Enum):
    """Which blocks may differ in width."""

    uniform = "uniform"
    """None: the result is a plain checkpoint."""
    adaptive = "adaptive"
    """All: each gets the width that it needs, and the checkpoint ships its modules."""


class TuneMethod(str, Enum):
    """How the outputs of a cut projection are fitted to the dense model's."""

    mask = "mask"
    """A scale for each input."""
    mask_bias = "mask+bias"
    """Scales and a bias."""
    lsq = "lsq"
    """The whole projection."""
    auto = "auto"
    """Per layer whichever holds best on held-out rows."""


def _read_share(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"must be auto or a number between 0 and 1, not {value!r}.")
    return share


def _read_blocks(value: Any) -> Any:
    if value == "none":
        return ()
    if not isinstance(value, str):
        return value
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"takes block numbers separated by commas, or none, not {value!r}.") from None


class PruneConfig(Config):
    """What to cut out of which model."""

    model: Model
    sparsity: Sparsity
    method: Annotated[
        str,
        Option(
            "spine: the best that was measured, which fits what stays to the dense model; comp: COMP, as built here, "
            "without that; or a baseline: magnitude, random, wanda-sp, flap or shortgpt."
        ),
    ] = "spine"
    metric: Annotated[
        str | None, Option("Reading of COMP's neuron metric: m0, m1, m2, m3 or m4.", default="m4, with --method comp")
    ] = None
    block_share: Annotated[
        Literal["auto"] | float,
        BeforeValidator(_read_share),
        Option(
            "Share of the budget spent on whole blocks, 0 to 1; auto compares on calibration rows. With spine and comp "
            "only."
        ),
    ] = "auto"
    protect: Annotated[
        tuple[int, ...] | None,
        BeforeValidator(_read_blocks),
        Option(
            "Blocks that stay, from 0, negative ones from the end, such as 0,1,-1; none protects none.",
            default="the first eighth and the last sixteenth",
        ),
    ] = None
    heads: Annotated[
        Heads,
        Option(
            "auto: heads leave if plain transformers can carry fewer; cut: from BERT and RoBERTa, too; keep: all heads "
            "stay."
        ),
    ] = Heads.auto
    widths: Annotated[
        Widths | None,
        Option(
            "uniform: all blocks alike, a plain checkpoint; adaptive: each as wide as it needs to be, with --method "
            "spine.",
            default="uniform, unless the model's blocks differ already",
        ),
    ] = None
    round_to: RoundTo = 8
    calibration: Annotated[CalibrationConfig, CALIBRATION] = CalibrationConfig()
    seed: Seed = 0
    device: Device = "cpu"
    dtype: Dtype = "float32"


class TuneCalibration(Config):
    """Text to tune on. What is None is taken from the prune run that made the input."""

    text: Annotated[
        str | None,
        Option("Text to calibrate on.", name="calibration", default="that of the prune run", decides=False),
    ] = None
    rows: Annotated[
        int | None,
        Field(ge=2),
        Option(
            "Rows of calibration text; the last eighth judges.", name="calibration-rows", default="as the prune run"
        ),
    ] = None
    length: Annotated[
        int | None,
        Field(ge=2),
        Option("Tokens per calibration row.", name="calibration-length", default="as the prune run"),
    ] = None
    special_tokens: Annotated[
        SpecialTokens | None, Option("auto or none, see spine prune.", default="as the prune run")
    ] = None


class TuneConfig(Config):
    """Which pruned checkpoint to recover, and how."""

    pruned: Annotated[Path, Option("Directory that spine prune wrote.", argument=True, decides=False)]
    method: Annotated[
        TuneMethod, Option("mask, mask+bias, lsq, or auto: per layer whichever holds best on held-out rows.")
    ] = TuneMethod.auto
    dense: Annotated[
        str | None,
        Option(
            "The dense checkpoint, if it has moved since; it must be the same, byte by byte.",
            default="where the prune run found it",
            decides=False,
        ),
    ] = None
    calibration: Annotated[TuneCalibration, CALIBRATION] = TuneCalibration()
    seed: Seed = 0
    device: Device = "cpu"
    dtype: Dtype = "float32"
