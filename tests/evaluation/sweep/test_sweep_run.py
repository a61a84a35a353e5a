from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Recipe, recipe

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.journal import PassJournal
from spinecli.artifacts.manifest import damaged_files, read_manifest
from spinecli.checkpoints.inspection import inspect_directory
from spinecli.config import read_config
from spinecli.data.config import CalibrationConfig
from spinecli.errors import OptionError, OutputExistsError
from spinecli.evaluation.config import EvaluateConfig, PerplexityConfig, TextConfig
from spinecli.evaluation.session import open_session
from spinecli.evaluation.sweep.config import AfterCut, SweepConfig
from spinecli.evaluation.sweep.request import open_request
from spinecli.evaluation.sweep.run import read_results, sweep
from spinecli.healing.config import HealConfig, HealText
from spinecli.healing.request import open_request as open_heal
from spinecli.healing.run import heal
from spinecli.healing.targets import PHASE as ASKING
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

Written = Callable[[Recipe], Path]
Make = Callable[..., SweepConfig]
LLAMA = recipe("llama", grouped=True, blocks=4)


@pytest.fixture
def options(written: Written, sample_file: Path) -> Make:
    def make(made: Recipe = LLAMA, **changes: Any) -> SweepConfig:
        plain = {
            "model": str(written(made)),
            "sparsity": "0.2,0.4",
            "perplexity": TextConfig(texts=(str(sample_file),), window=32, rows=4),
            "calibration": CalibrationConfig(text=str(sample_file), rows=8, length=16),
        }
        return read_config(SweepConfig, None, {**plain, **changes})

    return make


def swept(asked: SweepConfig, out: Path, **allowed: bool) -> Any:
    return sweep(open_request(asked), OutputOptions(out, **allowed))


def sums(directory: Path) -> dict[str, str]:
    return {name: record.sha256 for name, record in read_manifest(directory).outputs.items()}


def test_every_point_has_its_figures(options: Make, tmp_path: Path) -> None:
    manifest, results = swept(options(methods="spine,flap"), tmp_path / "out")
    names = ["dense", "spine-0.2", "spine-0.4", "flap-0.2", "flap-0.4"]
    assert [row.name for row in results.rows] == names
    assert [row.tuned for row in results.rows] == [None, None, None, "auto", "auto"]
    dense = results.dense
    for row in results.points:
        removed = 1 - row.block_parameters / dense.block_parameters
        assert row.achieved_sparsity == pytest.approx(removed)
        assert abs(row.achieved_sparsity - row.sparsity) < 0.12
        assert row.parameters - row.block_parameters == dense.parameters - dense.block_parameters
        assert row.bytes == 4 * row.parameters
        assert row.flops_per_token < dense.flops_per_token
        assert row.speed is None
        assert len(row.perplexity) == 1
    assert results.points[0].parameters > results.points[1].parameters
    assert manifest.kind == "sweep"
    assert [step.kind for step in manifest.lineage] == ["dense-checkpoint"]
    assert read_results(tmp_path / "out") == results
    assert damaged_files(tmp_path / "out", read_manifest(tmp_path / "out")) == {}
    assert {"sweep.json", "report.html"} <= set(manifest.outputs) <= {"sweep.json", "report.html", "curve.png"}
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"][0]["name"] == "dense"


def test_a_point_is_what_prune_and_eval_say(options: Make, tmp_path: Path) -> None:
    asked = options(sparsity="0.4", keep=True)
    _, results = swept(asked, tmp_path / "out")
    alone = PruneConfig(model=asked.model, sparsity=0.4, calibration=asked.calibration)
    manifest = prune(open_prune(alone), OutputOptions(tmp_path / "pruned"))
    assert sums(tmp_path / "out" / "points" / "spine-0.4") == sums(tmp_path / "pruned")
    refit: Any = manifest.report["refit"]
    (point,) = results.points
    assert point.held_out == pytest.approx(min(refit["held_out_before"], refit["held_out_after"]), rel=1e-5)

    (text,) = asked.perplexity.texts
    texts = PerplexityConfig(texts=(text,), window=32, rows=4)
    config = EvaluateConfig(model=str(tmp_path / "pruned"), against=(asked.model,), perplexity=texts)
    models = open_session(config).measure().models
    assert [model.perplexity[0].perplexity for model in models] == [row.perplexity[text] for row in results.rows]
    assert [model.weights.flops_per_token for model in models] == [row.flops_per_token for row in results.rows]


def test_scores_and_sensitivities_are_found_once_a_method(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int]] = []
    asked = options(methods="spine,spine:adaptive,flap")
    context = RunContext(progress=lambda phase, done, total: heard.append((phase, done)))
    _, results = sweep(open_request(asked), OutputOptions(tmp_path / "out"), context)
    assert len(results.points) == 6
    assert [done for phase, done in heard if phase == "scoring blocks"] == [1, 2, 3, 4] * 3
    assert [done for phase, done in heard if phase == "measuring sensitivity"] == [1, 2, 3, 4]
    assert [done for phase, done in heard if phase == "points"] == list(range(7))


def test_adaptive_widths_are_a_method_of_their_own(options: Make, tmp_path: Path) -> None:
    _, results = swept(options(methods="spine:adaptive", keep=True), tmp_path / "out")
    assert [row.method for row in results.points] == ["spine:adaptive"] * 2
    place = tmp_path / "out" / "points"
    assert sorted(path.name for path in place.iterdir()) == ["spine-adaptive-0.2", "spine-adaptive-0.4"]


def test_kept_points_are_artifacts_and_belong_to_the_sweep(options: Make, tmp_path: Path) -> None:
    asked = options(methods="flap", tune=AfterCut.lsq, keep=True)
    manifest, _ = swept(asked, tmp_path / "out")
    for name in ("flap-0.2", "flap-0.4"):
        place = tmp_path / "out" / "points" / name
        found: Any = inspect_directory(place, verify=True)
        assert (found["manifest"]["kind"], found["damaged"]) == ("tuned-checkpoint", {})
        assert f"points/{name}/model.safetensors" in manifest.outputs
    assert damaged_files(tmp_path / "out", manifest) == {}
    again, _ = swept(asked, tmp_path / "out", overwrite=True)
    assert again.digest == manifest.digest
    (tmp_path / "out" / "points" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="did not write"):
        swept(asked, tmp_path / "out", overwrite=True)


def test_the_speed_of_a_point_is_taken_beside_the_dense_model(options: Make, tmp_path: Path) -> None:
    _, results = swept(options(sparsity="0.4", latency=True), tmp_path / "out")
    dense, point = results.rows
    assert dense.speed is not None
    assert dense.speed.decode_ratio == dense.speed.prefill_ratio == 1
    assert point.speed is not None
    assert min(point.speed.decode, point.speed.dense_decode, point.speed.prefill_ratio) > 0
    assert results.generation is not None
    assert results.machine is not None


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_sweep_killed_anywhere_resumes_to_the_same_bytes(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinecli.artifacts.journal.PassJournal", partial(PassJournal, share=float("inf")))
    asked = options(methods="spine,flap", keep=True)
    whole, _ = swept(asked, tmp_path / "whole")
    seen: set[tuple[int, str, int]] = set()
    finished = 0

    def kill_at_new(phase: str, done: int, total: int) -> None:
        nonlocal finished
        if phase == "points":
            finished = done
        moment = (finished, phase, done)
        if phase != "perplexity" and moment not in seen:
            seen.add(moment)
            raise Killed

    for _ in range(200):
        try:
            context = RunContext(progress=kill_at_new)
            sweep(open_request(asked), OutputOptions(tmp_path / "out", resume=True), context)
            break
        except Killed:
            assert not (tmp_path / "out").exists()
    assert len({phase for _, phase, _ in seen}) >= 5
    assert {point for point, _, _ in seen} == {0, 1, 2, 3, 4}
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")
    assert read_manifest(tmp_path / "out").digest == whole.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_finished_sweep_is_not_repeated(options: Make, tmp_path: Path) -> None:
    asked = options(sparsity="0.3", methods="magnitude", tune=AfterCut.none)
    first, results = swept(asked, tmp_path / "out")
    again, same = swept(asked, tmp_path / "out", resume=True)
    assert (again.measured, same) == (first.measured, results)
    with pytest.raises(OutputExistsError):
        swept(asked.model_copy(update={"sparsity": "0.4"}), tmp_path / "out", resume=True)


def test_a_ratio_that_cannot_be_does_not_end_the_others(options: Make, tmp_path: Path) -> None:
    asked = options(sparsity="0.01,0.5", methods="magnitude", tune=AfterCut.none)
    _, results = swept(asked, tmp_path / "out")
    assert [row.sparsity for row in results.points] == [0.5]
    (refusal,) = results.refused
    assert (refusal.name, refusal.sparsity) == ("magnitude-0.01", 0.01)
    assert "smallest unit" in refusal.reason


def test_a_sweep_without_a_point_is_refused_and_leaves_nothing(options: Make, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="smallest unit"):
        swept(options(sparsity="0.001", methods="magnitude"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": "flap:adaptive"}, "belongs to --method spine"),
        ({"sparsity": "0.2,1.5"}, "--sparsity"),
        ({"round_to": 999}, "--round-to 999"),
        ({"methods": "flap", "calibration": CalibrationConfig(rows=1, length=16)}, "at least 2"),
        ({"perplexity": TextConfig(window=999)}, "lower --window"),
    ],
    ids=str,
)
def test_wrong_options_are_told_before_any_work(options: Make, change: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        open_request(options(**change))


def test_an_encoder_is_judged_by_its_output(options: Make, tmp_path: Path) -> None:
    plain = {"perplexity": TextConfig()}
    encoder = recipe("bert", blocks=4)
    _, results = swept(options(encoder, **plain), tmp_path / "out")
    assert results.dense.held_out == 0
    assert results.dense.perplexity == {}
    assert 0 < results.points[0].held_out < results.points[1].held_out
    for change in (
        {"perplexity": TextConfig(texts=("builtin:python-docs",))},
        {"latency": True},
        {"heal_tokens": 100},
    ):
        with pytest.raises(OptionError, match="is for language models"):
            open_request(options(encoder, **{**plain, **change}))


def test_perplexity_is_that_of_a_loaded_model(options: Make, tmp_path: Path) -> None:
    asked = options(sparsity="0.4", keep=True)
    _, results = swept(asked, tmp_path / "out")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tmp_path / "out" / "points" / "spine-0.4"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    ids = torch.tensor(tokenizer(Path(asked.perplexity.texts[0]).read_text(), add_special_tokens=False)["input_ids"])
    windows = ids[: 4 * 32].view(4, 32)
    with torch.no_grad():
        loss = float(model(windows, labels=windows).loss)
    assert results.points[0].perplexity[asked.perplexity.texts[0]] == pytest.approx(exp(loss), rel=1e-4)


def test_every_cut_is_healed_as_spine_heal_does_and_the_dense_model_is_asked_once(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(methods="spine,flap", sparsity="0.4", keep=True, heal_tokens=10_000)
    phases: list[str] = []
    context = RunContext(progress=lambda phase, done, total: phases.append(phase) if done == total else None)
    _, results = sweep(open_request(asked), OutputOptions(tmp_path / "out"), context)
    assert results.heal_tokens == 10_000
    assert phases.count(ASKING) == 1
    _, without = swept(options(methods="spine,flap", sparsity="0.4"), tmp_path / "cuts")
    assert [row.block_parameters for row in results.points] == [row.block_parameters for row in without.points]

    prune(
        open_prune(PruneConfig(model=asked.model, sparsity=0.4, calibration=asked.calibration)),
        OutputOptions(tmp_path / "cut"),
    )
    text = HealText(text=asked.calibration.text, tokens=10_000)
    heal(open_heal(HealConfig(pruned=tmp_path / "cut", text=text)), OutputOptions(tmp_path / "healed"))
    assert sums(tmp_path / "out" / "points" / "spine-0.4") == sums(tmp_path / "healed")
    assert [step.command for step in read_manifest(tmp_path / "out" / "points" / "flap-0.4").lineage] == [
        "",
        "prune",
        "tune",
    ]
