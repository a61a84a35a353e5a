from __future__ import annotations

from typing import Any

import pytest
from pages import read_page
from perplexity_samples import perplexity_of

from spinecli.checkpoints.cut_picture import BlockCut
from spinecli.evaluation.comparison import compare
from spinecli.evaluation.config import EvaluateConfig, GenerationConfig
from spinecli.evaluation.latency import rates
from spinecli.evaluation.page.page import Command
from spinecli.evaluation.report_page import report_html
from spinecli.evaluation.results import (
    ClassificationResult,
    Continuation,
    Evaluation,
    ForwardResult,
    LatencyResult,
    ModelResult,
    Weights,
)
from spinecli.healing.config import Loss
from spinecli.healing.curve import Curve, Judged

HOSTILE = "</title><script>alert(1)</script>\"'&"
NOW = "2026-01-01T00:00:00+00:00"


def measured(label: str, scale: float, **changes: Any) -> ModelResult:
    text = perplexity_of(scale)
    made = ModelResult(
        label=label,
        reference=f"models/{label}",
        adapter=None,
        weights=Weights(
            parameters=int(7_160_000 * scale),
            block_parameters=int(6_000_000 * scale),
            adapter_parameters=0,
            bytes_on_disk=int(28_600_000 * scale),
            flops_per_token=16_000_000,
        ),
        perplexity=(text,),
        latency=LatencyResult(prefill=rates([1000.0, 2000.0]), decode=rates([100 / scale, 150 / scale])),
    )
    return made.model_copy(update=changes)


def classifier(label: str, scale: float) -> ModelResult:
    answers = ClassificationResult(
        data="reviews",
        description="reviews",
        accuracy=0.9 * scale,
        accuracy_error=0.02,
        nll=0.3 / scale,
        macro_f1=0.8 * scale,
        f1={},
        examples=200,
        shortened=0,
        max_length=32,
        matched_by="name",
    )
    passes = ForwardResult(rows=rates([10 / scale]), tokens=rates([320 / scale]))
    return measured(label, scale, perplexity=(), latency=None, classification=answers, forward=passes)


def evaluation(*models: ModelResult) -> Evaluation:
    return Evaluation(
        settings=EvaluateConfig(model="model", generation=GenerationConfig(prompt_length=64)),
        machine={"threads": 2, "device": "cpu", "accelerator": None},
        models=models,
        comparison=compare(models),
    )


def test_the_report_is_one_well_formed_file() -> None:
    page = read_page(report_html(evaluation(measured("dense", 1.0), measured("pruned", 0.5)), NOW))
    assert "perplexity, words <1>.txt" in page.texts
    assert "How it was measured" in page.texts


def test_it_begins_with_what_was_cut_what_that_costs_and_what_it_gives() -> None:
    cut = (BlockCut(2, 4, 30, 60), BlockCut(0, 4, 0, 60))
    page = read_page(report_html(evaluation(measured("dense", 1.0), measured("pruned", 0.5, cut=cut)), NOW))
    assert (
        "has 50.0% fewer block parameters than dense: it keeps 1 of 2 blocks, 2 of 8 heads and 30 of 120 channels. "
        "Perplexity on words <1>.txt rises from 30 to 60 (+100.0%). It generates 2.00 times as fast and takes "
        "14.30 MB on disk instead of 28.60 MB."
    ) in page.text


def test_every_model_is_a_named_point_with_its_figures_on_hover() -> None:
    models = [measured("dense", 1.0), *(measured(f"pruned-{part}", 1 - part / 10) for part in range(1, 7))]
    page = read_page(report_html(evaluation(*models), NOW))
    assert {model.label for model in models} <= page.names_beside_points()
    assert any("pruned-3: perplexity" in title and "42.86" in title for title in page.titles)


def test_models_of_one_size_and_quality_have_a_name_each() -> None:
    models = [measured("dense", 1.0), *(measured(f"same-{number}", 0.5) for number in range(4))]
    page = read_page(report_html(evaluation(*models), NOW))
    assert {model.label for model in models} <= page.names_beside_points()


def test_how_a_model_was_healed_is_a_curve() -> None:
    judged = [
        Judged(step=step, tokens=1000 * step, held_out=0.5 - step / 100, held_out_lm=3.0, training=0.4)
        for step in range(9)
    ]
    healed = measured("pruned", 0.5).model_copy(update={"healing": Curve(loss=Loss.kl, curve=tuple(judged))})
    page = read_page(report_html(evaluation(measured("dense", 1.0), healed), NOW))
    assert "Healing of pruned" in page.texts
    assert {"0.5000", "0.4200"} <= page.names_beside_points()
    assert any("0.4700 on held-out rows after 3,000 tokens" in title for title in page.titles)


@pytest.mark.parametrize("field", ["label", "reference", "text", "said", "command", "machine"])
def test_what_a_user_named_is_shown_and_never_read_as_html(field: str) -> None:
    model = measured(HOSTILE if field == "label" else "pruned", 0.5)
    if field == "reference":
        model = model.model_copy(update={"reference": HOSTILE})
    if field == "said":
        model = model.model_copy(update={"continuations": (Continuation(prompt=HOSTILE, text=HOSTILE),)})
    dense = measured("dense", 1.0)
    if field == "text":
        texts = (model.perplexity[0].model_copy(update={"description": HOSTILE}),)
        dense, model = (each.model_copy(update={"perplexity": texts}) for each in (dense, model))
    found = evaluation(dense, model)
    if field == "machine":
        found = found.model_copy(update={"machine": {"threads": 1, "processor": HOSTILE}})
    commands = (Command(HOSTILE, HOSTILE, HOSTILE),) if field == "command" else ()
    assert HOSTILE in read_page(report_html(found, NOW, commands)).text


def test_names_of_any_length_and_script_leave_the_page_readable() -> None:
    models = [measured("dense", 1.0), measured("x" * 300, 0.7), measured("模型" * 40, 0.5), measured("", 0.4)]
    page = read_page(report_html(evaluation(*models), NOW))
    assert max(map(len, page.names_beside_points())) < 60
    assert "x" * 300 in page.texts


def test_a_model_alone_has_a_sentence_and_a_table() -> None:
    page = read_page(report_html(evaluation(measured("dense", 1.0)), NOW))
    assert "has 7.16M parameters in 28.60 MB. Perplexity on words <1>.txt is 30." in page.text
    assert "<svg" not in page.source


def test_without_a_figure_of_quality_speed_is_shown_against_size() -> None:
    models = [measured("dense", 1.0, perplexity=()), measured("pruned", 0.5, perplexity=())]
    page = read_page(report_html(evaluation(*models), NOW))
    assert {"dense", "pruned"} <= page.names_beside_points()
    assert "decode, tokens/s, higher is better" in page.texts
    bare = [model.model_copy(update={"latency": None}) for model in models]
    assert "<svg" not in read_page(report_html(evaluation(*bare), NOW)).source


def test_of_classifiers_accuracy_is_a_percentage() -> None:
    page = read_page(report_html(evaluation(classifier("dense", 1.0), classifier("pruned", 0.5)), NOW))
    assert "Accuracy on reviews falls from 90.0% to 45.0%. It classifies 2.00 times as fast" in page.text
    assert "45.0% ± 2.0%" in page.texts


def test_a_perplexity_beyond_all_numbers_is_named_below_the_plot() -> None:
    lost = measured("lost", 0.5)
    broken = lost.perplexity[0].model_copy(update={"perplexity": float("inf")})
    models = [measured("dense", 1.0), measured("pruned", 0.6), lost.model_copy(update={"perplexity": (broken,)})]
    page = read_page(report_html(evaluation(*models), NOW))
    assert "Without a name or a place in the plot: lost." in page.text
    assert "pruned" in page.names_beside_points()


def test_models_that_say_the_same_share_a_line() -> None:
    def saying(label: str, scale: float, text: str) -> ModelResult:
        return measured(label, scale, continuations=(Continuation(prompt="once there", text=text),))

    models = [saying("dense", 1.0, "was a fox"), saying("pruned", 0.7, "was a fox"), saying("cut", 0.5, "")]
    page = read_page(report_html(evaluation(*models), NOW))
    for words in ("once there …", "dense, pruned", "was a fox", "(ends here)"):
        assert words in page.texts


def test_the_way_to_the_result_is_a_list_of_commands() -> None:
    commands = (Command("spine prune dense --sparsity 0.5 --out pruned", "half removed"), Command("spine eval pruned"))
    page = read_page(report_html(evaluation(measured("dense", 1.0), measured("pruned", 0.5)), NOW, commands))
    assert [text for text in page.texts if text.startswith("spine ")] == [command.line for command in commands]
