from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_federations import Watched
from stopped_runs import StoppedError, Until, stopped
from sums import contents

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import Manifest, damaged_files, read_manifest
from spinecli.checkpoints.masks import Masks
from spinecli.errors import UnfinishedRunError
from spinecli.federation import run as federated_run
from spinecli.federation.history import HISTORY_NAME, read_history
from spinecli.federation.request import FederatedRequest
from spinecli.federation.results import FederatedResult
from spinecli.federation.run import MASKS_DIRECTORY, launch
from spinecli.federation.strategies import STRATEGIES


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr(federated_run, "can_plot", lambda: False)


@pytest.fixture
def request_of(requests: Any) -> Any:
    """Devices fail and come late on the way, so that what a resumed run must remember is all there."""

    def make(strategy: str, **changes: Any) -> FederatedRequest:
        made: FederatedRequest = requests(strategy=strategy, deadline=0.5, fleet={"dropout": 0.2}, **changes)
        return made

    return make


def test_the_same_run_twice_is_the_same_to_the_last_byte(request_of: Any, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("one", "two")]
    for elsewhere, out in enumerate(outs):
        torch.manual_seed(elsewhere)
        launch(request_of("fedspine", deploy=True), OutputOptions(out))
    one, two = map(contents, outs)
    assert one == two
    assert published_by_seed(request_of, tmp_path) != one["spine.json"]
    assert {"adapter_config.json", "adapter_model.safetensors", HISTORY_NAME, "spine.json"} <= one.keys()


def published_by_seed(request_of: Any, tmp_path: Path) -> str:
    return launch(request_of("fedspine", deploy=True, seed=1), OutputOptions(tmp_path / "three")).digest


def test_stopped_after_any_round_it_ends_with_the_same_bytes(request_of: Any, tmp_path: Path) -> None:
    request = request_of("fedspine", deploy=True)
    launch(request, OutputOptions(tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    for last in range(request.options.rounds):
        out = tmp_path / f"after-{last}"
        stopped(launch, request, out, last)
        rest = Until(None)
        launch(request, OutputOptions(out, resume=True), listener=rest)
        assert rest.heard == list(range(last + 1, request.options.rounds))
        assert contents(out) == expected


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "fedspine"])
def test_every_strategy_stopped_twice_ends_with_the_same_bytes(request_of: Any, tmp_path: Path, strategy: str) -> None:
    request = request_of(strategy)
    launch(request, OutputOptions(tmp_path / "whole"))
    stopped(launch, request, tmp_path / "out", 0)
    stopped(launch, request, tmp_path / "out", 2, resume=True)
    launch(request, OutputOptions(tmp_path / "out", resume=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["verify_deployed", "summarised"])
def test_stopped_while_writing_it_goes_on(
    request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    request = request_of("fedspine", deploy=True)
    launch(request, OutputOptions(tmp_path / "whole"))
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(federated_run, moment, stop)
        with pytest.raises(StoppedError):
            launch(request, OutputOptions(out))
    assert not out.exists()
    launch(request, OutputOptions(out, resume=True))
    assert contents(out) == contents(tmp_path / "whole")


def test_stopped_between_a_rounds_line_and_its_state_the_round_is_run_again(
    request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("fedspine-model")
    launch(request, OutputOptions(tmp_path / "whole"))
    saved = federated_run.RunState.save

    def save(state: Any, directory: Path) -> None:
        if state.rounds == 3:
            raise StoppedError
        saved(state, directory)

    with monkeypatch.context() as patched:
        patched.setattr(federated_run.RunState, "save", save)
        with pytest.raises(StoppedError):
            launch(request, OutputOptions(tmp_path / "out"))
    rest = Until(None)
    launch(request, OutputOptions(tmp_path / "out", resume=True), listener=rest)
    assert rest.heard == [2, 3]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_unfinished_run_is_not_gone_on_with_unasked_or_with_other_options(request_of: Any, tmp_path: Path) -> None:
    stopped(launch, request_of("fedit"), tmp_path / "out", 1)
    with pytest.raises(UnfinishedRunError, match="--resume"):
        launch(request_of("fedit"), OutputOptions(tmp_path / "out"))
    with pytest.raises(UnfinishedRunError, match="other options"):
        launch(request_of("fedit", learning_rate=0.5), OutputOptions(tmp_path / "out", resume=True))
    launch(request_of("fedit"), OutputOptions(tmp_path / "out", resume=True))


def test_a_finished_run_is_not_run_again(request_of: Any, tmp_path: Path) -> None:
    request = request_of("fedit")
    first = launch(request, OutputOptions(tmp_path / "out"))
    heard = Until(None)
    again = launch(request, OutputOptions(tmp_path / "out", resume=True), listener=heard)
    assert heard.heard == []
    assert again == first


def test_what_is_published_is_what_the_run_learned(request_of: Any, tmp_path: Path) -> None:
    out, request = tmp_path / "out", request_of("fedspine")
    manifest: Manifest = launch(request, OutputOptions(out))
    assert damaged_files(out, read_manifest(out)) == {}
    assert manifest.digest == read_manifest(out).digest
    watched = Watched(request)
    records = watched.go_on(request.options.rounds)
    assert read_history(out / HISTORY_NAME) == records
    result = FederatedResult.model_validate(manifest.report)
    assert result.rounds == len(records)
    assert result.seconds == records[-1].ended
    assert result.bytes == sum(record.bytes for record in records)
    assert records[-1].evaluation is not None
    assert result.accuracy == records[-1].evaluation.accuracy
    for node in watched.federation.setting.nodes:
        masks = watched.federation.strategy.masks_of(node.name)
        place = out / MASKS_DIRECTORY / node.name
        assert place.exists() == (masks is not None)
        if masks is not None:
            for mine, theirs in zip(masks.blocks, Masks.load(place).blocks, strict=True):
                assert torch.equal(mine.heads, theirs.heads)
                assert torch.equal(mine.channels, theirs.channels)
    assert {group.group for group in result.groups} == {"slow", "fast"}
    assert all(group.ratio > 0.35 for group in result.groups)


def test_a_picture_is_drawn_where_there_is_matplotlib(
    requests: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    for out in (tmp_path / "one", tmp_path / "two"):
        launch(requests(strategy="fedit", rounds=2), OutputOptions(out))
    one, two = ((tmp_path / name / "rounds.png").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_run_whose_evaluation_is_no_number_can_still_be_resumed(requests: Any, tmp_path: Path) -> None:
    """One step at an absurd rate leaves huge weights, whose answers are no numbers."""
    request = requests(strategy="fedit", learning_rate=1e30, local_steps=1, rounds=3)
    stopped(launch, request, tmp_path / "out", 0)
    manifest = launch(request, OutputOptions(tmp_path / "out", resume=True))
    assert manifest.report["rounds"] == 3
