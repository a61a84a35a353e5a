"""rounds.png: how a federated run went. Needs matplotlib, which is optional.

Accuracy and loss over the rounds, over the time of the rounds and over the traffic; below, what every round and every
device cost: time, bytes, waiting, and answers that did not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

from spinecli.artifacts.picture_file import save_figure
from spinecli.federation.engine import LossReason
from spinecli.federation.history import RoundRecord

PICTURE_NAME = "rounds.png"

_BLUE, _ORANGE, _GREY = "#2f6fc4", "#c2560c", "#9aa1ab"
_LOST = {"late": _ORANGE, "failed": "#b3261e", "refused": "#8f3fb0"}
# More would not be readable: of a larger fleet the devices that waited most.
_MOST_DEVICES = 20
_CLOCK = ((172_800.0, 86_400.0, "days"), (7_200.0, 3_600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
_TRAFFIC = ((2e12, 1e12, "TB"), (2e9, 1e9, "GB"), (2e6, 1e6, "MB"), (0.0, 1e3, "kB"))


@dataclass(frozen=True)
class DeviceShares:
    """One device over all rounds that it took part in."""

    device: str
    idle: float
    """Share of the rounds' time that it waited after its answer, where its answer counted."""
    lost: float
    """Share of its rounds without an answer that counted, for whatever reason."""


def device_shares(rounds: Sequence[RoundRecord]) -> list[DeviceShares]:
    """By device, those that waited most first."""
    found: dict[str, list[tuple[float, float, bool]]] = {}
    for record in rounds:
        for device in record.devices:
            seen = (device.waiting_seconds, record.seconds, device.lost is not None)
            found.setdefault(device.device, []).append(seen)
    shares = []
    for name, took_part in found.items():
        answered = [(waited, seconds) for waited, seconds, lost in took_part if not lost]
        whole = sum(seconds for _, seconds in answered)
        idle = sum(waited for waited, _ in answered) / whole if whole > 0 else 0.0
        shares.append(DeviceShares(name, idle, 1 - len(answered) / len(took_part)))
    return sorted(shares, key=lambda share: (-share.idle, share.device))


def save_picture(rounds: Sequence[RoundRecord], title: str, path: Path) -> None:
    """Draw all rounds of a run; of split training also the divergence of the merged labels."""
    from matplotlib.figure import Figure

    splits = all(record.split is not None for record in rounds)
    figure: Any = Figure(figsize=(13.2, 9.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.9, 1))
    _draw_quality(upper.subplots(2, 3, sharex="col", sharey="row"), rounds)
    panels: list[Callable[[Any, Sequence[RoundRecord]], None]] = [_draw_round_cost, _draw_waiting, _draw_devices]
    if splits:
        panels.insert(2, _draw_divergence)
    for axis, draw in zip(lower.subplots(1, len(panels)), panels, strict=True):
        draw(axis, rounds)
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path)


def _draw_quality(axes: Any, rounds: Sequence[RoundRecord]) -> None:
    """Accuracy above loss, each over rounds, the clock and the traffic."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    scale, unit = _scaled(rounds[-1].ended, _CLOCK)
    sent = list(accumulate(record.bytes for record in rounds))
    size, size_unit = _scaled(sent[-1], _TRAFFIC)
    places: list[tuple[str, Sequence[float]]] = [
        ("round", [record.round + 1 for record in rounds]),
        (f"{unit} since the start", [record.ended / scale for record in rounds]),
        (f"{size_unit}, up and down", [total / size for total in sent]),
    ]
    measured = [index for index, record in enumerate(rounds) if record.evaluation is not None]
    accuracy = [record.evaluation.accuracy for record in rounds if record.evaluation is not None]
    loss = [record.evaluation.loss for record in rounds if record.evaluation is not None]
    for column, (name, along) in enumerate(places):
        across = [along[index] for index in measured]
        for axis, values, colour in ((axes[0, column], accuracy, _BLUE), (axes[1, column], loss, _ORANGE)):
            axis.plot(across, values, marker="o", markersize=3.5 if len(values) <= 60 else 0, color=colour)
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(name)
    axes[0, 0].set_ylabel("held-out accuracy")
    axes[1, 0].set_ylabel("held-out loss")
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_round_cost(axis: Any, rounds: Sequence[RoundRecord]) -> None:
    """Time as bars, bytes as a line on an axis of its own."""
    scale, unit = _scaled(max(record.seconds for record in rounds), _CLOCK)
    size, size_unit = _scaled(max(record.bytes for record in rounds), _TRAFFIC)
    numbers = [record.round + 1 for record in rounds]
    axis.bar(numbers, [record.seconds / scale for record in rounds], color=_GREY, width=0.8)
    axis.set_ylabel(f"{unit} a round (bars)")
    other = axis.twinx()
    other.plot(numbers, [record.bytes / size for record in rounds], color=_BLUE, marker="o", markersize=3)
    other.set_ylabel(f"{size_unit} a round (line)", color=_BLUE)
    other.set_ylim(bottom=0)
    _by_round(axis)


def _draw_waiting(axis: Any, rounds: Sequence[RoundRecord]) -> None:
    """The mean idle share of a round's devices, and above each other the shares whose answers did not count."""
    numbers = [record.round + 1 for record in rounds]
    below = [0.0] * len(rounds)
    for reason in get_args(LossReason):
        shares = [_lost_share(record, reason) for record in rounds]
        if any(shares):
            axis.bar(numbers, shares, 0.8, below, color=_LOST[reason], alpha=0.8, label=f"devices {reason}")
            below = [low + share for low, share in zip(below, shares, strict=True)]
    idle = [record.idle_share for record in rounds]
    axis.plot(numbers, idle, color=_BLUE, marker="o", markersize=3, label="time idle")
    axis.set_ylabel("share of a round")
    axis.set_ylim(0, min(1.05, max(0.1, *idle, *below) * 1.1))
    _legend_above(axis)
    _in_percent(axis.yaxis)
    _by_round(axis)


def _draw_devices(axis: Any, rounds: Sequence[RoundRecord]) -> None:
    """Idle time and lost rounds of every device."""
    shares = device_shares(rounds)
    shown = shares[:_MOST_DEVICES][::-1]
    places, some = range(len(shown)), len(shown) < len(shares)
    idle, lost = [share.idle for share in shown], [share.lost for share in shown]
    axis.barh([place + 0.2 for place in places], idle, 0.38, color=_BLUE, label="time idle")
    axis.barh([place - 0.2 for place in places], lost, 0.38, color=_ORANGE, label="rounds lost")
    axis.set_yticks(places, [_short(share.device) for share in shown], fontsize=8 if len(shown) <= 12 else 6)
    axis.set_xlabel(f"share, of the {len(shown)} of {len(shares)} devices that wait most" if some else "share")
    axis.set_xlim(left=0)
    _legend_above(axis)
    _in_percent(axis.xaxis)
    axis.grid(axis="x", alpha=0.3)


def _draw_divergence(axis: Any, rounds: Sequence[RoundRecord]) -> None:
    values = [record.split.divergence for record in rounds if record.split is not None]
    axis.plot([record.round + 1 for record in rounds], values, color=_BLUE, marker="o", markersize=3)
    axis.set_ylabel("KL of merged labels, nats")
    axis.set_ylim(bottom=0)
    _by_round(axis)


def _lost_share(record: RoundRecord, reason: str) -> float:
    return sum(device.lost == reason for device in record.devices) / max(1, len(record.devices))


def _by_round(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("round")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)


def _legend_above(axis: Any) -> None:
    axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)


def _in_percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def _scaled(largest: float, units: Sequence[tuple[float, float, str]]) -> tuple[float, str]:
    """The unit that fits the largest value: its size and its name."""
    return next((size, name) for least, size, name in units if largest >= least)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}"
