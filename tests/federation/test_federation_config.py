from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from small_federations import Maker
from sums import learned

import spinecli
from spinecli.artifacts.directory import OutputOptions
from spinecli.config import make_config, read_config
from spinecli.errors import OptionError
from spinecli.federation.client.importance import SCORES
from spinecli.federation.config import DataConfig, FederateConfig, ScoreName, SelectionName, SplitConfig, TrainConfig
from spinecli.federation.launch import launch
from spinecli.federation.request import open_request
from spinecli.federation.split.control.selection.registry import SELECTIONS
from spinecli.federation.split.request import split_request

SOURCE = Path(spinecli.__file__).parent
SMALLEST: dict[str, Any] = {"model": "builtin:tiny", "data": "texts.jsonl"}


# what an order tells a device, and who obeys it
CLIPPING = {
    "federation/client/device.py",
    "federation/client/training.py",
    "federation/split/messages.py",
    "federation/split/device.py",
    "federation/split/server.py",
}


def config_of(**given: Any) -> FederateConfig:
    return read_config(FederateConfig, None, {**SMALLEST, **given})


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("prune_interval", {"federation/rounds.py"}),
        ("evaluation_limit", {"federation/request.py"}),
        ("divergence_limit", {"federation/split/control/plan.py", "federation/split/control/refinement.py"}),
        ("clip_norm", {"federation/rounds.py", "federation/split/rounds.py", "federation/split/run.py", *CLIPPING}),
    ],
)
def test_an_option_is_named_on_its_field_and_where_it_is_used(name: str, uses: set[str]) -> None:
    texts = {place.relative_to(SOURCE).as_posix(): place.read_text(encoding="utf-8") for place in SOURCE.rglob("*.py")}
    counts = {place: len(re.findall(rf"\b{name}\b", text)) for place, text in texts.items()}
    assert {place for place, count in counts.items() if count} == uses | {"federation/config.py"}
    assert counts["federation/config.py"] == 1


@pytest.mark.parametrize("name", ["local_steps", "clip_norm", "prune_interval", "learning_rate", "largest_batch"])
def test_no_command_repeats_an_option(name: str) -> None:
    places = (SOURCE / "commands").glob("fed_*.py")
    assert [place.name for place in places if name in place.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"largest_batch": 0}, "--largest-batch must be at least 1, not 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0"),
        ({"cohort": 0}, "--cohort must be at least 1, not 0"),
        ({"divergence_limit": -0.1}, "--divergence-limit must be at least 0, not -0.1"),
        ({"selection": "best"}, "--selection must be one of greedy, genetic, priority, random"),
        ({"ingress": 0}, "--ingress must be above 0, not 0"),
        ({"clip_norm": float("nan")}, "--clip-norm must be above 0, not nan"),
        ({"target_accuracy": 1.5}, "--target-accuracy must be above 0 and at most 1, not 1.5"),
        ({"smallest_rank": 9, "largest_rank": 8}, "--largest-rank 8 is below --smallest-rank 9; swap them"),
        ({"cut_layer": "deep"}, "--cut-layer 'deep' is not a number of blocks; give a number, or auto"),
        ({"clock": "wall"}, "--clock wall needs devices that take their own time"),
        ({"strategy": "mergesfl", "deploy": True}, "--deploy has no effect with mergesfl"),
        ({"strategy": "mergesfl", "engine": "flower"}, "--engine flower does not run mergesfl"),
    ],
    ids=str,
)
def test_wrong_options_are_told(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        config_of(**given)


def test_what_may_be_named_is_what_there_is() -> None:
    assert get_args(SelectionName) == tuple(SELECTIONS)
    assert get_args(ScoreName) == tuple(SCORES)


def test_data_that_nobody_names_are_asked_for_by_their_flag() -> None:
    with pytest.raises(OptionError, match="--data is missing: Training data"):
        read_config(FederateConfig, None, {"model": "builtin:tiny"})


@pytest.mark.parametrize(
    "given",
    [{"cut_layer": 2}, {"bottom": "full"}, {"optimizer": "sgd"}, {"ingress": 3.0}, {"divergence_limit": 0.1}],
    ids=str,
)
def test_options_of_split_training_are_refused_where_nothing_is_split(given: dict[str, Any]) -> None:
    flag = "--" + next(iter(given)).replace("_", "-")
    with pytest.raises(OptionError, match=f"{flag} belongs to split training; fedit does not use it"):
        config_of(strategy="fedit", **given)
    config_of(strategy="mergesfl", **given)
    config_of(strategy="fedit", **SplitConfig().model_dump())


@pytest.mark.parametrize(
    ("strategy", "rate", "expected"), [("fedit", None, 1e-3), ("fedavg", None, 2e-4), ("fedavg", 0.1, 0.1)]
)
def test_the_learning_rate_is_the_usual_one_unless_it_is_named(
    strategy: str, rate: float | None, expected: float
) -> None:
    assert config_of(strategy=strategy, learning_rate=rate).learning_rate == expected


@pytest.mark.parametrize(
    ("engine", "clock", "expected"),
    [("local", None, "fleet"), ("nvflare", None, "wall"), ("flower", "fleet", "fleet")],
)
def test_the_clock_is_the_engines_unless_it_is_named(engine: str, clock: str | None, expected: str) -> None:
    assert config_of(engine=engine, clock=clock).clock == expected


def test_a_config_survives_yaml_and_takes_models_and_single_values(tmp_path: Path) -> None:
    plain = config_of(strategy="mergesfl", cut_layer=3, rounds=7, plan="plan", task="language", lora_scale=4)
    file = tmp_path / "run.yaml"
    file.write_text(plain.as_yaml(), encoding="utf-8")
    assert read_config(FederateConfig, file, {}) == plain
    assert read_config(FederateConfig, file, {"rounds": 8}).train.rounds == 8
    made = make_config(
        FederateConfig, "builtin:tiny", {"data": DataConfig(train="texts.jsonl"), "train": TrainConfig(rounds=7)}
    )
    assert made == config_of(rounds=7)
    assert set(yaml.safe_load(plain.as_yaml())) == set(FederateConfig.model_fields)


@pytest.mark.parametrize("strategy", ["fedspine", "mergesfl"])
def test_the_recorded_config_makes_the_same_bytes_again(requests: Maker, tmp_path: Path, strategy: str) -> None:
    def run(config: FederateConfig, out: Path) -> FederateConfig:
        request, output = open_request(config), OutputOptions(out)
        manifest = launch(split_request(request) if config.splits else request, output)
        return FederateConfig.model_validate(manifest.config)

    given = {"cut_layer": 1, "bottom": "full"} if strategy == "mergesfl" else {"deploy": True}
    asked = requests.config(strategy=strategy, rounds=2, **given)
    recorded = run(asked, tmp_path / "first")
    assert recorded == asked
    assert run(recorded, tmp_path / "second") == recorded
    assert learned(tmp_path / "first") == learned(tmp_path / "second") != {}
