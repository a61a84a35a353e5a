from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from spinecli.errors import FederationError
from spinecli.federation.history import (
    DeviceRecord,
    History,
    IterationRecord,
    Measurement,
    RoundRecord,
    SplitRecord,
    read_history,
)
from spinecli.federation.results import require_accepted


def record(number: int, *devices: DeviceRecord, loss: float = 1.0, **changes: Any) -> RoundRecord:
    return RoundRecord(
        round=number,
        began=number * 10.0,
        ended=number * 10.0 + 10,
        learning_rate=1e-3,
        evaluation=Measurement(loss=loss, accuracy=0.5),
        devices=devices,
        **changes,
    )


DEVICES = (
    DeviceRecord(
        device="a", waiting_seconds=0.1 + 0.2, bytes_down=10, bytes_up=5, loss_before=1 / 3, loss_after=0.2, rank=4.5
    ),
    DeviceRecord(device="b", waiting_seconds=4.0, bytes_down=10, bytes_up=7),
    DeviceRecord(device="c", lost="failed", explanation="it left", bytes_down=10),
)


def test_a_round_is_summed_up_over_the_devices_that_answered() -> None:
    found = record(0, *DEVICES)
    assert found.seconds == 10
    assert found.bytes == 42
    assert found.idle_share == pytest.approx((0.3 + 4) / 2 / 10)
    assert found.slowest == "a"


def test_a_round_that_nobody_answered_has_no_slowest_and_no_idle_share() -> None:
    found = record(0, DEVICES[2])
    assert (found.slowest, found.idle_share, found.bytes) == (None, 0.0, 10)
    assert record(0).bytes == 0


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    for number in range(3):
        history.append(record(number, *DEVICES))
        assert read_history(path) == history.rounds
    assert len(path.read_text().splitlines()) == 3
    assert History(path, read_history(path)).rounds == history.rounds


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_written_as_json_and_read_again(tmp_path: Path, loss: float) -> None:
    path = tmp_path / "history.jsonl"
    History(path).append(record(0, loss=loss))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    found = read_history(path)[0].evaluation
    assert found is not None
    assert found.loss == loss or (math.isnan(found.loss) and math.isnan(loss))


def test_a_line_cut_short_ends_the_history_and_is_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    whole = History(path)
    for number in range(3):
        whole.append(record(number, *DEVICES))
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    assert read_history(path) == whole.rounds[:2]
    resumed = History(path, read_history(path)[:1])
    assert read_history(path) == whole.rounds[:1]
    for number in range(1, 3):
        resumed.append(record(number, *DEVICES))
    assert path.read_bytes() == content
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_kill_while_it_is_cut_back_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.append(record(0, *DEVICES))
    history.append(record(1, *DEVICES))

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", kill)
        with pytest.raises(Killed):
            History(path, history.rounds[:1])
    assert read_history(path) == history.rounds


def test_a_run_that_accepted_nothing_is_refused_with_counts_and_a_way_out(tmp_path: Path) -> None:
    late = DeviceRecord(device="d", lost="late", explanation="its answer would have come after 7 s")
    require_accepted([record(0, DEVICES[2]), record(1, *DEVICES)], 5.0, tmp_path)
    with pytest.raises(FederationError) as raised:
        require_accepted([record(0, DEVICES[2], late), record(1, late)], 5.0, tmp_path)
    told = str(raised.value)
    assert "any of the 2 rounds (1 failed, 2 late; first c in round 1: it left)" in told
    assert "a longer --deadline, above 5 s, or none and more --rounds or a larger --cohort." in told
    assert str(tmp_path / "history.jsonl") in told
    with pytest.raises(FederationError, match=r"\(no device took part\).*a larger --cohort or another fleet"):
        require_accepted([record(0)], None, tmp_path)


def test_a_split_round_without_a_step_has_accepted_nothing() -> None:
    def split(*losses: float | None) -> SplitRecord:
        steps = tuple(IterationRecord(ended=1.0, rows=2, loss=loss) for loss in losses)
        return SplitRecord(
            divergence=0.0, selected_divergence=0.0, feasible=True, predicted_seconds=None, iterations=steps
        )

    assert not record(0, DEVICES[0], split=split(None, None)).accepted
    assert record(0, DEVICES[0], split=split(None, 0.5)).accepted
    assert not record(0, DEVICES[2], split=split(None, 0.5)).accepted
    assert record(0, DEVICES[0], split=split()).accepted, "without iterations nothing is split"
