"""What `spine sweep` is asked for."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from spinecli.config import Config, Device, Dtype, Model, Option, RoundTo, Seed
from spinecli.data.config import CALIBRATION, CalibrationConfig
from spinecli.evaluation.config import Names, TextConfig
from spinecli.evaluation.sweep.ratios import DEFAULT_STEP, ratios_in
from spinecli.pruning.config import TuneMethod

if TYPE_CHECKING:
    from spinecli.pruning.method import Method


class AfterCut(str, Enum):
    """What follows a cut."""

    none = "none"
    """Nothing."""
    auto = "auto"
    """`spine tune --method auto` after methods that leave the kept weights as they were; nothing after the others."""
    mask = "mask"
    """`spine tune --method mask` after every method."""
    lsq = "lsq"
    """`spine tune --method lsq` after every method."""

    def after(self, method: Method) -> TuneMethod | None:
        """How a cut by `method` is tuned; None if it is not."""
        if self is AfterCut.none or (self is AfterCut.auto and method.refits):
            return None
        return TuneMethod(self.value)


def _as_text(value: Any) -> Any:
    """Numbers as a person would type them."""
    if isinstance(value, (int, float)):
        return str(value)
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _with_ratios(text: str) -> str:
    ratios_in(text)
    return text


def _of_a_range(step: float | None, beside: ValidationInfo) -> float | None:
    text = beside.data.get("sparsity")
    if text is not None and step is not None:
        if ".." not in text:
            raise ValueError(f"belongs to a range such as 0.1..0.5, and --sparsity {text} has none.")
        ratios_in(text, step)
    return step


class SweepConfig(Config):
    """Which model to prune in which ways, and what to measure of the results."""

    model: Model
    sparsity: Annotated[
        str,
        BeforeValidator(_as_text),
        AfterValidator(_with_ratios),
        Option("Sparsities, as shares of the block parameters: 0.1,0.2,0.35, a range 0.1..0.5, or both."),
    ]
    step: Annotated[
        float | None,
        Field(gt=0),
        AfterValidator(_of_a_range),
        Option(
            "Distance from one sparsity of a range to the next. The end of the range is included if a step meets it.",
            default=f"{DEFAULT_STEP:g}",
            decides=False,
        ),
    ] = None
    methods: Annotated[
        Names,
        Option(
            "Methods of spine prune, separated by commas, each alone or with its widths; spine:adaptive lets blocks "
            "differ in width."
        ),
    ] = ("spine",)
    tune: Annotated[
        AfterCut,
        Option(
            "How to tune after a cut: none; auto, which runs spine tune unless the method re-fits as it cuts; mask or "
            "lsq, which tune every cut by that method."
        ),
    ] = AfterCut.auto
    heal_tokens: Annotated[
        int,
        Field(ge=0),
        Option(
            "Number of tokens to train every cut on, as spine heal does, on the calibration text; 0 trains nothing."
        ),
    ] = 0
    perplexity: Annotated[TextConfig, Option("Perplexity of every point.", panel="Perplexity")] = TextConfig()
    latency: Annotated[bool, Option("Measure the speed of prefill and decode, each point and MODEL in turns.")] = False
    keep: Annotated[bool, Option("Keep every point's checkpoint under points/.")] = False
    round_to: RoundTo = 8
    calibration: Annotated[CalibrationConfig, CALIBRATION] = CalibrationConfig()
    seed: Seed = 0
    device: Device = "cpu"
    dtype: Dtype = "float32"

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The ratios, rising."""
        return ratios_in(self.sparsity, self.step)
