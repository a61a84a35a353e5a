"""What `spine prune` and `spine tune` are asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from spinecli.checkpoints.shape import Heads
from spinecli.config import Config, Device, Dtype, Model, Option, RoundTo, Seed, Sparsity
from spinecli.data.config import CALIBRATION, CalibrationConfig, SpecialTokens, as_several


class Widths(str, Enum):
    """Which blocks may differ in width."""

    uniform = "uniform"
    """None: the result is a plain checkpoint."""
    adaptive = "adaptive"
    """All: each gets the width that it needs, and the checkpoint ships its modules."""


class Effort(str, Enum):
    """How much computing a cut may cost."""

    fast = "fast"
    """One allocation, without blocks or heads if channels are enough, and one re-fit."""
    normal = "normal"
    """Several allocations are compared, and gated layers are re-fitted from both ends."""
    best = "best"
    """More allocations, and the ends are fitted to more tokens."""


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
            "Pruning method. spine measured best and re-fits the remaining weights to the dense model; comp is COMP, "
            "as built here, without a re-fit; magnitude, random, wanda-sp, flap and shortgpt are baselines."
        ),
    ] = "spine"
    metric: Annotated[
        str | None,
        Option("Reading of COMP's neuron metric to use: m0, m1, m2, m3 or m4.", default="m4, with --method comp"),
    ] = None
    block_share: Annotated[
        Literal["auto"] | float,
        BeforeValidator(_read_share),
        Option(
            "Share of the budget to spend on whole blocks, from 0 to 1; auto compares several on calibration rows. "
            "Only for the methods spine and comp."
        ),
    ] = "auto"
    protect: Annotated[
        tuple[int, ...] | None,
        BeforeValidator(_read_blocks),
        Option(
            "Blocks to keep, such as 0,1,-1, counted from 0, or from the end if negative; none protects no block.",
            default="the first eighth and the last sixteenth",
        ),
    ] = None
    heads: Annotated[
        Heads,
        Option(
            "Whether to remove heads. auto: if plain transformers supports fewer heads; cut: from BERT and RoBERTa, "
            "too; keep: never."
        ),
    ] = Heads.auto
    widths: Annotated[
        Widths | None,
        Option(
            "Widths of the blocks. uniform gives all blocks the same widths, in a plain checkpoint; adaptive gives "
            "each block the widths that it needs, and requires --method spine.",
            default="uniform, unless the model's blocks differ already",
        ),
    ] = None
    effort: Annotated[
        Effort,
        Option(
            "How much to compute. fast takes one allocation without comparing it; normal compares a few; best compares "
            "more and re-fits longer. Only for methods that compare allocations."
        ),
    ] = Effort.normal
    round_to: RoundTo = 8
    calibration: Annotated[CalibrationConfig, CALIBRATION] = CalibrationConfig()
    seed: Seed = 0
    device: Device = "cpu"
    dtype: Dtype = "float32"


class TuneCalibration(Config):
    """Text to tune on. What is None is taken from the prune run that made the input."""

    text: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(as_several),
        Option(
            "Text to calibrate on, as in spine prune; may be repeated.",
            name="calibration",
            default="the rows of the prune run",
            decides=False,
        ),
    ] = None
    rows: Annotated[
        int | None,
        Field(ge=2),
        Option(
            "Number of calibration rows; the last eighth is held out.",
            name="calibration-rows",
            default="as the prune run",
        ),
    ] = None
    length: Annotated[
        int | None,
        Field(ge=2),
        Option("Number of tokens in a calibration row.", name="calibration-length", default="as the prune run"),
    ] = None
    special_tokens: Annotated[
        SpecialTokens | None,
        Option("How calibration rows begin: auto or none, as in spine prune.", default="as the prune run"),
    ] = None


class TuneConfig(Config):
    """Which pruned checkpoint to recover, and how."""

    pruned: Annotated[Path, Option("Directory that spine prune wrote.", argument=True, decides=False)]
    method: Annotated[
        TuneMethod,
        Option("How to recover: mask, mask+bias, lsq, or auto, which takes what is best on held-out rows per layer."),
    ] = TuneMethod.auto
    dense: Annotated[
        str | None,
        Option(
            "Where the dense checkpoint is, if it has moved; it must be the same, byte for byte.",
            default="where the prune run found it",
            decides=False,
        ),
    ] = None
    calibration: Annotated[TuneCalibration, CALIBRATION] = TuneCalibration()
    seed: Seed = 0
    device: Device = "cpu"
    dtype: Dtype = "float32"
