"""`spine fed-launch` as a user runs it: its output, its silence, and what a kill leaves."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from killing import end_after, end_at, there_is, work_of
from spine_process import Here, Step, run_step, spine
from sums import contents
from tiny_llama import labelled_rows

from spinecli.federation.config import SPLITTING
from spinecli.federation.strategies import STRATEGIES

ROUNDS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federated")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(160)))
    return path


@pytest.fixture(scope="module")
def common(dense: Path, data: Path) -> tuple[object, ...]:
    sizes = ("--cohort", 4, "--local-steps", 6, "--batch-size", 8, "--max-length", 16)
    return (
        "fed-launch", dense, "--data", data, "--fleet", "phones-8", "--sparsity", 0.3, "--learning-rate", 0.005, *sizes
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(folder: Path, common: tuple[object, ...]) -> Step:
    """Long enough to be met in the middle; phones fail on the way."""
    options = ("--strategy", "fedspine", "--rounds", ROUNDS, "--deploy", "--json")
    return run_step(folder / "undisturbed", *common, *options)


def test_a_run_says_one_json_object_and_nothing_else(undisturbed: Step) -> None:
    found = undisturbed.finished.json
    assert found["rounds"] == ROUNDS
    assert found["accuracy"] > 0.7
    assert found["bytes"] > 0
    assert found["seconds"] > 0
    assert {group["group"] for group in found["groups"]} == {"low", "mid", "high"}
    assert all(abs(group["ratio"] - 0.3) < 0.01 for group in found["groups"])
    assert "\r" not in undisturbed.finished.stderr, "no live table where there is no terminal"
    files = undisturbed.contents
    assert {"adapter_config.json", "adapter_model.safetensors", "history.jsonl", "spine.json"} <= files.keys()
    assert {f"deployed/{name}/model.safetensors" for name in ("low", "mid", "high")} <= files.keys()
    assert work_of(undisturbed.out).exists() is False


def test_what_it_wrote_is_an_artifact_that_inspect_verifies(undisturbed: Step, spine_here: Here) -> None:
    done = spine_here("inspect", undisturbed.out, "--verify")
    assert done.code == 0, done.stderr
    assert "fedspine" in done.stdout


def test_a_deployed_checkpoint_is_a_model_for_the_next_command(undisturbed: Step, spine_here: Here) -> None:
    done = spine_here("inspect", undisturbed.out / "deployed" / "low")
    assert done.code == 0, done.stderr


def test_the_plain_words_name_the_result_and_who_was_lost(
    common: tuple[object, ...], tmp_path: Path, spine_here: Here
) -> None:
    done = spine_here(*common, "--strategy", "fedit", "--rounds", 3, "--deadline", 0.4, "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    for word in ("accuracy", "time on the fleet", "traffic", "answers lost", "late", str(tmp_path / "out")):
        assert word in done.stdout.replace("\n", " ") or word in done.stdout.replace("\n", "")
    assert "fedit on phones-8: 8 devices, 4 a round" in done.stderr
    quiet = spine_here(*common, "--strategy", "fedit", "--rounds", 1, "--out", tmp_path / "quiet", "--quiet")
    assert (quiet.code, quiet.stderr) == (0, "")


def test_a_printed_config_asks_for_the_same_run(common: tuple[object, ...], tmp_path: Path, spine_here: Here) -> None:
    typed = ("--strategy", "fedit", "--rounds", 2, "--rank", 2)
    printed = spine_here(*common, *typed, "--print-config")
    assert (printed.code, printed.stderr) == (0, "")
    file = tmp_path / "run.yaml"
    file.write_text(printed.stdout, encoding="utf-8")
    for name, asked in {"typed": (*common, *typed), "read": ("fed-launch", "--config", file)}.items():
        done = spine_here(*asked, "--out", tmp_path / name)
        assert done.code == 0, done.stderr
    assert contents(tmp_path / "typed") == contents(tmp_path / "read")
    again = spine_here("fed-launch", "--config", file, "--rounds", 3, "--print-config")
    assert again.stdout == printed.stdout.replace("rounds: 2", "rounds: 3")


def test_a_dry_run_shows_the_labels_and_writes_nothing(
    common: tuple[object, ...], tmp_path: Path, spine_here: Here
) -> None:
    done = spine_here(*common, "--partition", "shards:1", "--dry-run", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    assert done.json["labels"] == ["early", "late"]
    assert list(tmp_path.iterdir()) == []
    shown = spine_here(*common, "--dry-run")
    assert shown.code == 0, shown.stderr
    assert "early" in shown.stdout
    assert "nothing was trained" in shown.stdout


@pytest.mark.parametrize("strategy", [*STRATEGIES, *SPLITTING])
def test_a_dry_run_compares_need_and_limit_under_every_strategy(
    common: tuple[object, ...], strategy: str, spine_here: Here
) -> None:
    done = spine_here(*common, "--strategy", strategy, "--dry-run", "--json")
    assert done.code == 0, done.stderr
    assert [row["class"] for row in done.json["memory"]] == ["low", "mid", "high"]
    assert all(row["least_bytes"] <= row["most_bytes"] <= row["limit_bytes"] for row in done.json["memory"])
    assert all(row["fits"] and row["work"] for row in done.json["memory"])
    assert done.json["refused"] is None


@pytest.mark.parametrize("strategy", ["fedit", "fedspine-model", "mergesfl"])
def test_a_dry_run_says_what_a_run_would_be_refused_for(
    common: tuple[object, ...], strategy: str, tmp_path: Path, spine_here: Here
) -> None:
    fleet = tmp_path / "dwarfs.toml"
    kind = 'name = "dwarf"\ncount = 2\nmodes = 1e9\nup_mbps = 1\ndown_mbps = 1\nmemory_gb = 0.00001\n'
    fleet.write_text(f'name = "dwarfs"\n[[class]]\n{kind}')
    asked = (*common, "--strategy", strategy, "--fleet", fleet)
    shown = spine_here(*asked, "--dry-run")
    assert shown.code == 0, shown.stderr
    assert "too" in shown.stdout
    refused = spine_here(*asked, "--out", tmp_path / "out")
    assert refused.code == 2
    sentence = refused.stderr.partition("error: ")[2].strip()
    assert "class dwarf have 1e-05 GB and need at least" in sentence
    assert f"a run would be refused: {sentence}" in shown.stdout
    assert list(tmp_path.iterdir()) == [fleet]


def test_a_plan_is_where_legend_starts(
    common: tuple[object, ...], dense: Path, tmp_path: Path, spine_here: Here
) -> None:
    shape = ("--fleet", "phones-8", "--labels", 2, "--batch-size", 8, "--length", 16, "--local-steps", 6, "--rank", 4)
    made = spine_here("plan", dense, *shape, "--out", tmp_path / "plan", "--json")
    assert made.code == 0, made.stderr
    run = ("--strategy", "legend", "--rank", 4, "--rounds", 2, "--plan", tmp_path / "plan", "--out", tmp_path / "out")
    done = spine_here(*common, *run, "--json")
    assert done.code == 0, done.stderr
    assert done.json["rounds"] == 2
    assert spine_here("inspect", tmp_path / "out", "--verify").code == 0


posix = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")


@posix
@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    undisturbed: Step, tmp_path: Path, spine_here: Here
) -> None:
    """Three kills of one run, each after a few more rounds, then one inside the writing."""
    out = tmp_path / "out"
    source = random.Random(0)
    arguments = undisturbed.arguments
    code, _ = end_at(there_is("state/rounds.safetensors"), out, *arguments)
    assert code == -signal.SIGKILL, "the run ended before it was met"
    code, _ = end_after(4 + 2 * source.random(), out, *arguments, "--resume")
    if code == -signal.SIGKILL:
        assert not out.exists()
        code, _ = end_at(there_is("files/adapter_config.json", "files/deployed"), out, *arguments, "--resume")
        assert code == -signal.SIGKILL
    done = spine_here(*arguments, "--out", out, "--resume")
    assert done.code == 0, done.stderr
    assert contents(out) == undisturbed.contents
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@posix
@pytest.mark.slow
def test_interrupt_says_how_to_go_on(undisturbed: Step, tmp_path: Path, spine_here: Here) -> None:
    out = tmp_path / "out"
    code, said = end_at(there_is("state/rounds.safetensors"), out, *undisturbed.arguments, "--quiet", by=signal.SIGINT)
    assert code == 130
    assert said.startswith("error: Stopped")
    assert "--resume" in said
    assert said.count("\n") == 1
    refused = spine_here(*undisturbed.arguments, "--out", out, "--quiet")
    assert refused.code == 2
    assert spine_here(*undisturbed.arguments, "--out", out, "--resume").code == 0
    assert contents(out) == undisturbed.contents


def test_the_same_command_in_another_process_is_the_same(
    common: tuple[object, ...], tmp_path: Path, spine_here: Here
) -> None:
    options = (*common, "--strategy", "fedspine-model", "--rounds", 3)
    assert spine_here(*options, "--out", tmp_path / "here").code == 0
    there = spine(*options, "--out", tmp_path / "there", PYTHONHASHSEED="7")
    assert there.code == 0, there.stderr
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
