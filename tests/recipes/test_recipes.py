"""Recipes: chains of commands that run, stay as they are, go on, and can be written back from what they made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from spinecli import api
from spinecli.app import app
from spinecli.artifacts.manifest import read_manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import OptionError, RecipeError, SpineError
from spinecli.recipes.recipe import Recipe, read_recipe, recipe_of
from spinecli.recipes.run import StepResult, expected, run_recipe

CHAIN: dict[str, Any] = {
    "pruned": {"prune": {"model": "builtin:tiny", "sparsity": 0.3, "method": "magnitude", "calibration": {"rows": 8}}},
    "tuned": {"tune": {"pruned": "${pruned}", "method": "mask"}},
    "plan": {"plan": {"model": "${tuned}", "fleet": "jetson-10", "length": 32}},
}


def written(tmp_path: Path, steps: dict[str, Any]) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"steps": steps}, sort_keys=False))
    return file


def ran(recipe: Recipe, out: Path) -> dict[str, bool]:
    """Which steps were left as they were."""
    done: list[StepResult] = run_recipe(recipe, out)
    return {each.step.name: each.unchanged for each in done}


def changed(**values: Any) -> dict[str, Any]:
    return {**CHAIN, "tuned": {"tune": {**CHAIN["tuned"]["tune"], **values}}}


def test_a_chain_runs_once_and_again_only_where_something_changed(tmp_path: Path) -> None:
    out = tmp_path / "chain"
    recipe = read_recipe(written(tmp_path, CHAIN))
    assert ran(recipe, out) == {"pruned": False, "tuned": False, "plan": False}
    assert read_manifest(out / "tuned").lineage[-1].reference == str(out / "pruned")
    assert ran(recipe, out) == {"pruned": True, "tuned": True, "plan": True}
    other = read_recipe(written(tmp_path, changed(method="lsq")))
    assert ran(other, out) == {"pruned": True, "tuned": False, "plan": False}


def test_every_command_with_a_manifest_is_left_as_it_is(tmp_path: Path) -> None:
    texts = {"texts": ["builtin:tiny-evaluation"], "rows": 2, "window": 32}
    data = {"train": "builtin:tiny-topics", "max_length": 32, "examples": {"limit": 100}}
    few = {"prompt_length": 8, "new_tokens": 2, "repeats": 1}
    steps = {
        "results": {"eval": {"model": "builtin:tiny", "perplexity": texts}},
        "sweep": {
            "sweep": {
                "model": "builtin:tiny",
                "sparsity": 0.3,
                "methods": ["magnitude"],
                "tune": "none",
                "perplexity": texts,
                "calibration": {"rows": 8},
            }
        },
        "bench": {"bench": {"models": ["builtin:tiny"], "engine": "torch", "generation": few}},
        "fed": {
            "fed-launch": {
                "model": "builtin:tiny",
                "strategy": "fedit",
                "fleet": "jetson-10",
                "data": data,
                "train": {"rounds": 1, "cohort": 2, "local_steps": 1},
            }
        },
    }
    recipe = read_recipe(written(tmp_path, steps))
    assert ran(recipe, tmp_path / "chain") == dict.fromkeys(steps, False)
    assert ran(recipe, tmp_path / "chain") == dict.fromkeys(steps, True)


def test_a_chain_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, recipe = tmp_path / "chain", read_recipe(written(tmp_path, CHAIN))

    def stopped(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("spinecli.pruning.recovery.tune.recover_into", stopped)
        with pytest.raises(KeyboardInterrupt):
            ran(recipe, out)
    assert ran(recipe, out) == {"pruned": True, "tuned": False, "plan": False}
    assert ran(read_recipe(written(tmp_path, CHAIN)), tmp_path / "whole")["tuned"] is False
    assert read_manifest(out / "tuned").digest == read_manifest(tmp_path / "whole" / "tuned").digest


def test_what_made_a_directory_is_a_recipe_that_makes_it_again(tmp_path: Path) -> None:
    ran(read_recipe(written(tmp_path, CHAIN)), tmp_path / "one")
    back = recipe_of(tmp_path / "one" / "plan")
    assert [(step.name, step.command, step.needs) for step in back.steps] == [
        ("pruned", "prune", ()),
        ("tuned", "tune", ("pruned",)),
        ("plan", "plan", ("tuned",)),
    ]
    file = tmp_path / "back.yaml"
    file.write_text(back.as_yaml())
    ran(read_recipe(file), tmp_path / "two")
    for name in ("pruned", "tuned"):  # a plan names the place of its model
        assert read_manifest(tmp_path / "one" / name).digest == read_manifest(tmp_path / "two" / name).digest


def test_a_dry_run_expects_the_sizes_that_are_written(tmp_path: Path) -> None:
    export = {"export": {"model": "${tuned}", "format": "gguf", "quantize": "f16"}}
    recipe = read_recipe(written(tmp_path, {**CHAIN, "phone": export}))
    steps = {each.step.name: each for each in expected(recipe, tmp_path / "chain")}
    assert not (tmp_path / "chain").exists()
    assert steps["plan"].bytes is None
    assert steps["phone"].place == tmp_path / "chain" / "phone.gguf"
    ran(recipe, tmp_path / "chain")
    made = Checkpoint.open(tmp_path / "chain" / "tuned").bytes
    assert steps["tuned"].bytes == pytest.approx(made, rel=0.02)
    assert steps["phone"].bytes == pytest.approx((tmp_path / "chain" / "phone.gguf").stat().st_size, rel=0.05)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({}, "must hold only named steps"),
        ({"a b": CHAIN["pruned"]}, "cannot be called 'a b'"),
        ({"../x": CHAIN["pruned"]}, "cannot be called"),
        ({"one": {"prine": {}}}, "names the command 'prine'"),
        ({"one": {"prune": 3}}, "must hold one command"),
        ({"one": {"prune": {}, "tune": {}}}, "must hold one command"),
        ({"tuned": CHAIN["tuned"], "pruned": CHAIN["pruned"]}, r"refers to \$\{pruned\}, and no step before it"),
        ({"pruned": {"prune": {"model": "m", "sparsity": 2}}}, "Step pruned: --sparsity must be above 0"),
        ({"pruned": {"prune": {"model": "m", "sparsity": 0.2, "rows": 2}}}, "Step pruned: There is no option rows"),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_told_before_anything_runs(tmp_path: Path, steps: dict[str, Any], words: str) -> None:
    with pytest.raises((RecipeError, OptionError), match=words):
        read_recipe(written(tmp_path, steps))


def test_an_error_names_its_step(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, {"cut": {"prune": {"model": str(tmp_path / "none"), "sparsity": 0.3}}}))
    with pytest.raises(SpineError, match=r"Step cut: .*none does not exist"):
        ran(recipe, tmp_path / "chain")


def test_foreign_files_in_a_steps_place_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "chain" / "pruned").mkdir(parents=True)
    (tmp_path / "chain" / "pruned" / "diary.txt").write_text("mine")
    with pytest.raises(SpineError, match="holds files that spine did not write"):
        ran(read_recipe(written(tmp_path, CHAIN)), tmp_path / "chain")
    assert (tmp_path / "chain" / "pruned" / "diary.txt").read_text() == "mine"


def test_the_command_runs_a_recipe_and_inspect_prints_it_back(tmp_path: Path) -> None:
    file, out = written(tmp_path, {name: CHAIN[name] for name in ("pruned", "tuned")}), tmp_path / "chain"
    plan = CliRunner().invoke(app, ["run", str(file), "--out", str(out), "--dry-run", "--json"])
    assert [step["exists"] for step in json.loads(plan.stdout)["steps"]] == [False, False]
    assert not out.exists()
    for unchanged in (False, True):
        done = CliRunner().invoke(app, ["run", str(file), "--out", str(out), "--json", "--quiet"])
        assert done.exit_code == 0, done.output
        assert [step["unchanged"] for step in json.loads(done.stdout)["steps"]] == [unchanged] * 2
    back = CliRunner().invoke(app, ["inspect", str(out / "tuned"), "--recipe"])
    assert list(yaml.safe_load(back.stdout)["steps"]) == ["pruned", "tuned"]
    config = CliRunner().invoke(app, ["inspect", str(out / "pruned"), "--print-config"])
    assert yaml.safe_load(config.stdout) == read_manifest(out / "pruned").config
    both = CliRunner().invoke(app, ["inspect", str(out / "pruned"), "--print-config", "--recipe"])
    assert (both.exit_code, both.stdout) == (2, "")


def test_a_recorded_config_reproduces_the_run(tmp_path: Path) -> None:
    first = api.prune("builtin:tiny", sparsity=0.2, method="random", seed=3, calibration_rows=8, out=tmp_path / "one")
    file = tmp_path / "config.yaml"
    file.write_text(CliRunner().invoke(app, ["inspect", str(tmp_path / "one"), "--print-config"]).stdout)
    done = CliRunner().invoke(app, ["prune", "--config", str(file), "--out", str(tmp_path / "two"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert first.manifest is not None
    assert read_manifest(tmp_path / "two").digest == first.manifest.digest
