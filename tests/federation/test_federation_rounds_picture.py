from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from spinecli.federation.history import DeviceRecord, Measurement, RoundRecord, SplitRecord
from spinecli.federation.rounds_picture import device_shares, save_picture


def record(number: int, devices: int = 3, **changes: Any) -> RoundRecord:
    taking_part = tuple(
        DeviceRecord(
            device=f"board-{index}",
            waiting_seconds=3.0 * index,
            bytes_down=4_000_000,
            bytes_up=1_000_000,
            lost="late" if index == 2 and number % 3 == 1 else None,
        )
        for index in range(devices)
    )
    whole: dict[str, Any] = {
        "round": number,
        "began": 60.0 * number,
        "ended": 60.0 * (number + 1),
        "learning_rate": 1e-3,
        "evaluation": Measurement(loss=1 / (number + 1), accuracy=1 - 1 / (number + 1)),
        "devices": taking_part,
    }
    return RoundRecord(**{**whole, **changes})


def split(divergence: float) -> SplitRecord:
    return SplitRecord(divergence=divergence, selected_divergence=1.0, feasible=True, predicted_seconds=None)


CASES = {
    "plain": [record(number) for number in range(12)],
    "one round": [record(0)],
    "without measurements": [record(number, evaluation=None) for number in range(3)],
    "measured now and then": [record(number, **({"evaluation": None} if number % 2 else {})) for number in range(6)],
    "without devices": [record(0, devices=0)],
    "a large fleet": [record(number, devices=90) for number in range(3)],
    "in no time": [record(0, began=0.0, ended=0.0)],
    "a loss that is no number": [record(0), record(1, evaluation=Measurement(loss=math.nan, accuracy=0.1))],
    "a loss beyond all numbers": [record(0), record(1, evaluation=Measurement(loss=math.inf, accuracy=0.1))],
    "split": [record(number, split=split(0.5 / (number + 1))) for number in range(5)],
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_any_kind_is_drawn_and_again_with_the_same_bytes(tmp_path: Path, case: str) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.png", "two.png"):
        save_picture(CASES[case], "legend on jetson-10", tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG")
    assert one == two


def test_a_device_is_idle_in_rounds_in_which_its_answer_counts() -> None:
    shares = {share.device: share for share in device_shares([record(number) for number in range(3)])}
    assert shares["board-0"].idle == 0
    assert shares["board-1"].idle == pytest.approx(3 / 60)
    assert shares["board-2"].idle == pytest.approx(6 / 60)
    assert shares["board-2"].lost == pytest.approx(1 / 3)
    assert [share.device for share in device_shares([record(0)])] == ["board-2", "board-1", "board-0"]
    assert device_shares([record(0, devices=0)]) == []
