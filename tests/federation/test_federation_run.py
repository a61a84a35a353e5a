from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_federations import Watched
from stopped_runs import StoppedError, Until, stopped
from sums import contents

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import Manifest, damaged_files, read_manifest
from spinecli.checkpoints.masks import Masks
from spinecli.errors import FederationError, OptionError, SpineError, UnfinishedRunError
from spinecli.federation import launch as launching
from spinecli.federation import run as federated_run
from spinecli.federation.history import HISTORY_NAME, RunState, load_state, read_history
from spinecli.federation.launch import launch
from spinecli.federation.messages import Message
from spinecli.federation.request import FederatedRequest
from spinecli.federation.results import FederatedResult
from spinecli.federation.run import MASKS_DIRECTORY, set_up
from spinecli.federation.strategies import STRATEGIES
from spinecli.federation.strategies.fedit import FedIT
from spinecli.lora.factors import Factors


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr(launching, "can_plot", lambda: False)


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
    for last in range(request.config.train.rounds):
        out = tmp_path / f"after-{last}"
        stopped(launch, request, out, last)
        rest = Until(None)
        launch(request, OutputOptions(out, resume=True), listener=rest)
        assert rest.heard == list(range(last + 1, request.config.train.rounds))
        assert contents(out) == expected


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "fedspine"])
def test_every_strategy_stopped_twice_ends_with_the_same_bytes(request_of: Any, tmp_path: Path, strategy: str) -> None:
    request = request_of(strategy)
    launch(request, OutputOptions(tmp_path / "whole"))
    stopped(launch, request, tmp_path / "out", 0)
    stopped(launch, request, tmp_path / "out", 2, resume=True)
    launch(request, OutputOptions(tmp_path / "out", resume=True))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("place", "moment"), [(federated_run, "verify_deployed"), (launching, "summarised")])
def test_stopped_while_writing_it_goes_on(
    request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, moment: str
) -> None:
    request = request_of("fedspine", deploy=True)
    launch(request, OutputOptions(tmp_path / "whole"))
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(place, moment, stop)
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
    saved = RunState.save

    def save(state: Any, directory: Path) -> None:
        if state.rounds == 3:
            raise StoppedError
        saved(state, directory)

    with monkeypatch.context() as patched:
        patched.setattr(RunState, "save", save)
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
    records = watched.go_on(request.config.train.rounds)
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


def test_a_run_whose_every_answer_is_refused_publishes_nothing_and_says_why(requests: Any, tmp_path: Path) -> None:
    """One step at an absurd rate leaves weights that no answer may hold."""
    request = requests(strategy="fedit", learning_rate=1e30, local_steps=1, rounds=2)
    with pytest.raises(FederationError, match=r"any of the 2 rounds \(6 refused; first .* in round 1.*--learning-rate"):
        launch(request, OutputOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["legend", "fedspine-model"])
def test_a_run_whose_every_answer_is_late_publishes_nothing_and_says_why(
    requests: Any, tmp_path: Path, strategy: str
) -> None:
    request = requests(strategy=strategy, deadline=1e-6, rounds=2, deploy=True)
    with pytest.raises(FederationError, match=r"\(6 late; .*longer --deadline, above 1e-06 s") as raised:
        launch(request, OutputOptions(tmp_path / "out"))
    assert raised.value.exit_code == 1
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.spine-work" / "files" / HISTORY_NAME
    assert str(kept) in str(raised.value)
    assert {device.lost for record in read_history(kept) for device in record.devices} == {"late"}


def test_a_run_that_learned_nothing_begins_anew_when_it_is_resumed(requests: Any, tmp_path: Path) -> None:
    """As on the clock that passes, where devices that were late may be in time the second time."""
    request, late = requests(strategy="fedit", rounds=2), [True]

    @contextmanager
    def connect(state: Path) -> Iterator[Any]:
        engine = set_up(request).engine
        exchange = engine.exchange
        engine.exchange = lambda jobs, deadline: exchange(jobs, 1e-6 if late[0] else deadline)  # type: ignore[method-assign]
        yield engine

    with pytest.raises(FederationError, match="6 late"):
        launch(request, OutputOptions(tmp_path / "out"), connect=connect)
    late[0] = False
    launch(request, OutputOptions(tmp_path / "out", resume=True), connect=connect)
    launch(request, OutputOptions(tmp_path / "undisturbed"))
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("evaluate_every", [1, 4])
def test_a_model_that_gives_no_numbers_ends_the_run_in_its_round_and_keeps_the_round_before(
    requests: Any, tmp_path: Path, evaluate_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers within bounds, each by itself, whose factors multiplied through the blocks overflow."""
    request = requests(strategy="fedit", evaluate_every=evaluate_every)
    aggregate_train = FedIT.aggregate_train

    def overflowing(self: FedIT, number: int, updates: Any, lost: Any) -> None:
        aggregate_train(self, number, updates, lost)
        if number == 2:
            self.adapter = {name: Factors(each.a + 1e15, each.b + 1e15) for name, each in self.adapter.items()}
            self.head = {name: value + 1e15 for name, value in self.head.items()}

    with monkeypatch.context() as patched:
        patched.setattr(FedIT, "aggregate_train", overflowing)
        with pytest.raises(
            FederationError, match=r"diverged in round 3 of 4: its loss on held-out data is nan, after "
        ):
            launch(request, OutputOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    work = tmp_path / ".out.spine-work"
    state = load_state(work / "state")
    assert state is not None
    assert state.rounds == len(read_history(work / "files" / HISTORY_NAME)) == 2
    launch(request, OutputOptions(tmp_path / "out", resume=True))
    launch(request, OutputOptions(tmp_path / "undisturbed"))
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("broken", [nan, inf])
def test_a_mean_that_is_no_number_never_becomes_the_state(requests: Any, broken: float) -> None:
    watched = Watched(requests(strategy="hetlora"))
    watched.go_on(1)
    strategy: Any = watched.federation.strategy
    aggregate_train = strategy.aggregate_train

    def breaking(number: int, updates: Any, lost: Any) -> None:
        aggregate_train(number, updates, lost)
        name = next(iter(strategy.adapter))
        strategy.adapter[name] = Factors(strategy.adapter[name].a * broken, strategy.adapter[name].b)

    strategy.aggregate_train = breaking
    with pytest.raises(FederationError, match=r"diverged in round 2 of 2: lora.* holds NaN or infinite values, from "):
        watched.go_on(2)
    assert [state.rounds for state in watched.states] == [1]


@pytest.mark.parametrize("strategy", ["flexlora", "flora"])
def test_answers_at_the_bounds_publish_no_nan_and_raise_no_stranger(
    requests: Any, tmp_path: Path, strategy: str
) -> None:
    """Weights near the largest that an answer may hold: their decompositions and norms are at the end of float32."""
    request = requests(strategy=strategy, learning_rate=5e14, local_steps=1, rounds=2, schedule="constant")
    with suppress(SpineError):
        launch(request, OutputOptions(tmp_path / "out"))
        weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_a_device_without_numbers_is_named_and_the_round_goes_on_without_it(
    requests: Any, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(requests(strategy="fedspine-model", cohort=5))
    engine: Any = watched.federation.engine
    answer = engine._handle

    def spoiled(kind: str, message: Message, device: Any) -> Message:
        found = answer(kind, message, device)
        return Message({**found.header, "loss_after": nan}, found.tensors) if device.name == "slow-01" else found

    engine._handle = spoiled
    records = watched.go_on(3)
    assert [[each.device for each in record.devices if each.lost] for record in records] == [["slow-01"]] * 3
    assert all(record.accepted for record in records)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["round 1 goes on without slow-01: Its figures are not finite at 'loss_after'."]


def test_a_learning_rate_that_changes_no_weight_is_refused(requests: Any) -> None:
    with pytest.raises(OptionError, match="--learning-rate 1e-40 changes no weight"):
        requests(learning_rate=1e-40)
