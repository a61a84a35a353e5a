"""A split run that is stopped and gone on with ends with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_splits import SplitMaker, Watched
from stopped_runs import StoppedError, Until, stopped
from sums import contents, digest

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import damaged_files, read_manifest
from spinecli.errors import UnfinishedRunError
from spinecli.federation import launch as launching
from spinecli.federation.history import HISTORY_NAME, History, RunState, load_state, read_history
from spinecli.federation.launch import launch
from spinecli.federation.results import FederatedResult
from spinecli.federation.split import run as split_run

FAILING = {"dropout": 0.2}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr(launching, "can_plot", lambda: False)


@pytest.mark.parametrize("strategy", ["mergesfl", "splitfed"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_restored_after_any_round_it_ends_with_the_same_bytes(
    splits: SplitMaker, tmp_path: Path, strategy: str, optimizer: Any
) -> None:
    request = splits(strategy=strategy, optimizer=optimizer, rounds=3, fleet=FAILING, cohort=4)
    whole = Watched(request)
    whole.go_on()
    for state in whole.states:
        place = tmp_path / f"after-{state.rounds}"
        place.mkdir()
        state.save(place)
        loaded = load_state(place)
        assert loaded is not None
        other = Watched(request)
        other.history = History(None, whole.rounds[: state.rounds])
        other.training.restore(loaded.strategy)
        other.engine.restore(loaded.engine)
        other.go_on()
        assert digest(other.training.bottom) == digest(whole.training.bottom)
        assert digest(other.training.top.tensors()) == digest(whole.training.top.tensors())
        assert other.training.state == whole.training.state
        assert other.rounds == whole.rounds
    assert len(whole.states) == 3


def test_a_saved_state_does_not_move_on_with_the_run(splits: SplitMaker) -> None:
    watched = Watched(splits(rounds=3))
    watched.go_on(1)
    before = digest(watched.states[0].strategy.tensors)
    watched.go_on()
    assert digest(watched.states[0].strategy.tensors) == before
    assert digest(watched.states[2].strategy.tensors) != before


def test_what_a_state_keeps_is_what_the_rounds_have_made(splits: SplitMaker) -> None:
    """Both halves, and with AdamW the moments of the merged top."""
    watched = Watched(splits(rounds=1))
    watched.go_on()
    names = set(watched.states[0].strategy.tensors)
    model = watched.federation.model
    plain = {f"bottom.{name}" for name in model.bottom_names} | {f"top.{name}" for name in model.top_names}
    moments = {f"top.moment.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in model.top_names}
    assert names == plain | moments


@pytest.mark.parametrize("strategy", ["mergesfl", "fedavg"])
def test_the_same_run_twice_is_the_same_to_the_last_byte(splits: SplitMaker, tmp_path: Path, strategy: str) -> None:
    """Wherever memory happens to lie, and whatever else has been drawn."""
    kept = []
    for elsewhere, name in enumerate(("one", "two")):
        torch.manual_seed(elsewhere)
        kept += [torch.randn(1000 * elsewhere + 17) for _ in range(20)]
        launch(splits(strategy=strategy), OutputOptions(tmp_path / name))
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one == two
    other = launch(splits(strategy=strategy, seed=1), OutputOptions(tmp_path / "other"))
    assert other.digest != one["spine.json"]


@pytest.mark.parametrize("strategy", ["mergesfl", "sfl-br"])
def test_stopped_after_any_round_it_publishes_the_same(splits: SplitMaker, tmp_path: Path, strategy: str) -> None:
    request = splits(strategy=strategy, fleet=FAILING, rounds=3, local_steps=2)
    launch(request, OutputOptions(tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    for last in range(3):
        out = tmp_path / f"after-{last}"
        stopped(launch, request, out, last)
        rest = Until(None)
        launch(request, OutputOptions(out, resume=True), listener=rest)
        assert rest.heard == list(range(last + 1, 3))
        assert contents(out) == expected


def test_stopped_twice_and_between_a_line_and_its_state(
    splits: SplitMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = splits(rounds=4)
    launch(request, OutputOptions(tmp_path / "whole"))
    stopped(launch, request, tmp_path / "out", 0)
    saved = RunState.save

    def save(state: Any, directory: Path) -> None:
        if state.rounds == 3:
            raise StoppedError
        saved(state, directory)

    with monkeypatch.context() as patched:
        patched.setattr(RunState, "save", save)
        with pytest.raises(StoppedError):
            launch(request, OutputOptions(tmp_path / "out", resume=True))
    rest = Until(None)
    launch(request, OutputOptions(tmp_path / "out", resume=True), listener=rest)
    assert rest.heard == [2, 3]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("place", "moment"), [(split_run, "verify_joined"), (launching, "summarised")])
def test_stopped_while_writing_it_goes_on(
    splits: SplitMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, moment: str
) -> None:
    request = splits(rounds=2)
    launch(request, OutputOptions(tmp_path / "whole"))

    def stop(*_: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(place, moment, stop)
        with pytest.raises(StoppedError):
            launch(request, OutputOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    launch(request, OutputOptions(tmp_path / "out", resume=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


CHANGES: list[dict[str, Any]] = [
    {"learning_rate": 0.5},
    {"cut_layer": 2},
    {"bottom": "full"},
    {"feature_dtype": "int8"},
    {"divergence_limit": 0.5},
    {"largest_batch": 8},
    {"ingress": 1.0},
    {"optimizer": "sgd"},
    {"selection": "genetic"},
    {"strategy": "sfl-br"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes)))
def test_an_unfinished_run_is_not_gone_on_with_other_options(
    splits: SplitMaker, tmp_path: Path, changes: dict[str, Any]
) -> None:
    stopped(launch, splits(rounds=2, local_steps=1), tmp_path / "out", 0)
    with pytest.raises(UnfinishedRunError, match="other options"):
        launch(splits(rounds=2, local_steps=1, **changes), OutputOptions(tmp_path / "out", resume=True))


def test_what_is_published_is_what_the_run_learned(splits: SplitMaker, tmp_path: Path) -> None:
    out, request = tmp_path / "out", splits(fleet=FAILING)
    manifest = launch(request, OutputOptions(out))
    assert damaged_files(out, read_manifest(out)) == {}
    watched = Watched(request)
    records = watched.go_on()
    assert read_history(out / HISTORY_NAME) == records
    result = FederatedResult.model_validate(manifest.report)
    assert result.rounds == len(records) == 3
    assert result.seconds == records[-1].ended
    assert result.bytes == sum(record.bytes for record in records)
    assert records[-1].evaluation is not None
    assert result.accuracy == records[-1].evaluation.accuracy
    assert manifest.kind == "joined-checkpoint"
    heard = Until(None)
    assert launch(request, OutputOptions(out, resume=True), listener=heard) == manifest
    assert heard.heard == []


def test_it_stops_at_its_target(splits: SplitMaker) -> None:
    watched = Watched(splits(rounds=9, target_accuracy=0.01))
    assert len(watched.go_on()) == 1
