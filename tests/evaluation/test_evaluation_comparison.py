from __future__ import annotations

from pathlib import Path

import pytest
from perplexity_samples import perplexity_of

from spinecli.evaluation.comparison import compare
from spinecli.evaluation.config import EvaluateConfig, GenerationConfig
from spinecli.evaluation.latency import rates
from spinecli.evaluation.plots import save_picture
from spinecli.evaluation.report import cell, conditions, ratio_cell
from spinecli.evaluation.results import (
    ComparisonRow,
    Evaluation,
    LatencyResult,
    MemoryResult,
    ModelResult,
    Weights,
)


def _model(label: str, scale: float, *, comparable: bool = True, measured: bool = True) -> ModelResult:
    text = perplexity_of(scale, comparable=comparable)
    results = {"tiny": {"alias": "tiny", "acc,none": 0.5 * scale, "acc_stderr,none": 0.05}}
    return ModelResult(
        label=label,
        reference=f"models/{label}",
        adapter=None,
        weights=Weights(
            parameters=int(7_160_000 * scale),
            block_parameters=6_000_000,
            adapter_parameters=0,
            bytes_on_disk=28_600_000,
            flops_per_token=16_000_000,
        ),
        perplexity=(text,),
        latency=LatencyResult(prefill=rates([1000.0, 2000.0]), decode=rates([100 / scale, 150 / scale])),
        memory=MemoryResult(peak_bytes=400, before_loading_bytes=300, added_bytes=100, device_peak_bytes=None),
        lm_eval={"results": results, "higher_is_better": {"tiny": {"acc": True}}, "lm_eval_version": "0.4.13"}
        if measured
        else None,
    )


def _evaluation(*models: ModelResult) -> Evaluation:
    machine = {"threads": 2, "device": "cpu", "accelerator": None}
    return Evaluation(
        settings=EvaluateConfig(model="model", generation=GenerationConfig(prompt_length=64)),
        machine=machine,
        models=models,
        comparison=compare(models),
    )


def _rows(*models: ModelResult) -> dict[str, ComparisonRow]:
    return {row.figure: row for row in compare(models)}


def test_ratios_are_to_the_first_model() -> None:
    rows = _rows(_model("dense", 1.0), _model("pruned", 0.5))
    assert rows["parameters"].ratios == (1.0, 0.5)
    assert rows["perplexity, words <1>.txt"].ratios == (1.0, 2.0)
    assert rows["decode, tokens/s"].ratios == (1.0, 2.0)
    assert rows["tiny acc"].deviations == (0.05, 0.05)
    assert [rows[name].better for name in ("parameters", "tiny acc", "decode, tokens/s")] == [
        "lower",
        "higher",
        "higher",
    ]


def test_what_nobody_measured_has_no_row() -> None:
    rows = _rows(_model("dense", 1.0))
    assert "peak memory on device" not in rows
    assert "adapter parameters" not in rows


def test_perplexities_of_other_tokens_have_no_ratio() -> None:
    row = _rows(_model("dense", 1.0), _model("foreign", 0.5, comparable=False))["perplexity, words <1>.txt"]
    assert row.ratios == (1.0, None)
    assert (cell(row, 1), ratio_cell(row, 1)) == ("60", "-")


def test_a_model_without_a_result_leaves_a_gap() -> None:
    row = _rows(_model("dense", 1.0), _model("pruned", 0.5, measured=False))["tiny acc"]
    assert (cell(row, 0), cell(row, 1), ratio_cell(row, 1)) == ("50.0% ± 5.0%", "-", "-")


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("count", 999, "999"),
        ("count", 7_160_000, "7.16M"),
        ("bytes", 28_600_000, "28.60 MB"),
        ("bytes", 3e12, "3000.00 GB"),
        ("score", 32.7621, "32.76"),
        ("score", 4.9447, "4.945"),
        ("rate", 25782.4, "25782"),
        ("score", 2.5e7, "2.5e+07"),
        ("share", 0.6333, "63.3%"),
    ],
)
def test_figures_in_words(form: str, value: float, text: str) -> None:
    assert cell(ComparisonRow(figure="x", better="lower", form=form, values=(value,), ratios=(1.0,)), 0) == text


def test_conditions_name_what_the_figures_depend_on() -> None:
    found = " ".join(conditions(_evaluation(_model("dense", 1.0), _model("pruned", 0.5))))
    for part in ("Ratios are to dense", "20 windows of 32 tokens, stride 32", "lm-eval 0.4.13", "64 + 32 tokens"):
        assert part in found
    assert "threads: 2" in found
    assert "Ratios" not in " ".join(conditions(_evaluation(_model("dense", 1.0))))


def test_results_survive_json() -> None:
    evaluation = _evaluation(_model("dense", 1.0), _model("pruned", 0.5))
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_the_picture_is_drawn_from_whatever_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bare = _model("dense", 1.0).model_copy(update={"perplexity": (), "latency": None, "memory": None, "lm_eval": None})
    for name, models in {
        "full": (_model("dense", 1.0), _model("pruned", 0.5)),
        "foreign": (_model("dense", 1.0), _model("foreign", 0.5, comparable=False)),
        "bare": (bare,),
    }.items():
        path = tmp_path / f"{name}.png"
        save_picture(_evaluation(*models), path)
        assert path.read_bytes().startswith(b"\x89PNG")
