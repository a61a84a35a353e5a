"""How training went: the held-out rows after some steps, as they are recorded, read again and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spinecli.artifacts.manifest import MANIFEST_NAME, read_manifest
from spinecli.artifacts.record import Record
from spinecli.healing.config import Loss

LOWERED = {
    Loss.kl: "KL divergence from the dense model",
    Loss.lm: "loss on the text",
    Loss.both: "KL divergence and loss on the text",
}
_HELD_OUT, _TRAINING = "#c2560c", "#7f7f7f"


class Judged(Record):
    """The held-out rows after some steps."""

    step: int
    tokens: int
    """Trained on so far."""
    held_out: float
    """Of what training lowers, the mean over their predicted tokens."""
    held_out_lm: float
    """Their negative log-likelihood."""
    training: float
    """The mean of what training lowers over the steps since the last judgement; 0 before the first."""


class Curve(Record):
    """One run of `spine heal`."""

    loss: Loss
    curve: tuple[Judged, ...]

    @property
    def lowered(self) -> str:
        """What training lowered, in words."""
        return LOWERED[self.loss]


def curve_of(directory: Path) -> Curve | None:
    """The curve of a healed checkpoint; None of anything else, and if its report is another version's."""
    if not (directory / MANIFEST_NAME).is_file():
        return None
    report = read_manifest(directory).report
    try:
        return Curve.model_validate({"loss": report.get("loss"), "curve": report.get("curve")})
    except ValidationError:
        return None


def draw(axis: Any, curve: Curve) -> None:
    """Training and held-out rows over the tokens that were trained on; the axis is matplotlib's."""
    tokens = [judged.tokens / 1e6 for judged in curve.curve]
    axis.plot(tokens, [judged.held_out for judged in curve.curve], "o-", color=_HELD_OUT, label="held-out rows")
    if len(curve.curve) > 1:
        training = [judged.training for judged in curve.curve[1:]]
        axis.step([0.0, *tokens[1:]], [training[0], *training], where="pre", color=_TRAINING, label="in training")
    axis.set_xlabel("million tokens")
    axis.set_ylabel("nats")
    axis.set_title(curve.lowered, fontsize=9)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axis.grid(alpha=0.3)
