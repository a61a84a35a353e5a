from __future__ import annotations

from typing import Annotated

from spinecli.artifacts.manifest import Step
from spinecli.config import Config, Option
from spinecli.evaluation.chain import commands_behind
from spinecli.pruning.config import PruneConfig


def step(command: str, reference: str, **config: object) -> Step:
    return Step(kind="x", command=command, reference=reference, digest="", summary="done", config=config)


DENSE = Step(kind="dense-checkpoint", command="", reference="dense", digest="", summary="")


def test_a_command_names_what_differs_from_the_defaults() -> None:
    config = PruneConfig(model="my model", sparsity=0.3, calibration={"text": "a.txt", "rows": 64})
    assert config.command_line("prune", "out") == (
        "spine prune 'my model' --sparsity 0.3 --calibration a.txt --calibration-rows 64 --out out"
    )


class Inner(Config):
    names: Annotated[tuple[str, ...], Option("", name="tasks")]
    limit: Annotated[int, Option("")] = 3


class Outer(Config):
    models: Annotated[tuple[str, ...], Option("", argument=True)] = ()
    inner: Inner | None = None
    fast: Annotated[bool, Option("")] = False


def test_parts_of_a_config_that_were_not_asked_for_have_no_flags() -> None:
    assert Outer(models=("a", "b")).command_line("bench", "there") == "spine bench a b --out there"
    whole = Outer(models=("a",), inner=Inner(names=("x", "y")), fast=True)
    assert whole.command_line("bench", "there") == "spine bench a --tasks x --tasks y --fast --out there"


def test_the_commands_behind_a_result_come_in_their_order_and_once() -> None:
    prune = step("prune", "cut", **PruneConfig(model="dense", sparsity=0.5, protect=(0, -1)).model_dump(mode="json"))
    tune = step("tune", "tuned", pruned="cut", method="lsq")
    assert [command.line for command in commands_behind([DENSE, prune, DENSE, prune, tune])] == [
        "spine prune dense --sparsity 0.5 --protect 0,-1 --out cut",
        "spine tune cut --method lsq --out tuned",
    ]


def test_a_command_whose_flags_are_not_known_here_is_told_by_its_file() -> None:
    (found,) = commands_behind([step("fed-launch", "split", model="cut", rounds=3)])
    assert found.line == "spine fed-launch --config fed-launch.yaml --out split"
    assert found.file == "model: cut\nrounds: 3"


def test_a_step_that_recorded_no_options_says_so() -> None:
    (found,) = commands_behind([step("prune", "cut")])
    assert found.line == "spine prune … --out cut"
    assert "not recorded" in found.summary
    (strange,) = commands_behind([step("prune", "cut", model="dense", sparsity="half")])
    assert strange.file == "model: dense\nsparsity: half"
