from __future__ import annotations

import pytest
from pages import read_page

from spinecli.evaluation.bench.cost import compared, spread
from spinecli.evaluation.bench.report import bench_html
from spinecli.evaluation.bench.results import (
    BenchConfig,
    BenchResults,
    EngineResult,
    EngineRun,
    ModelFacts,
    PromisedWork,
)
from spinecli.evaluation.config import GenerationConfig
from spinecli.evaluation.latency import rates
from spinecli.evaluation.results import ForwardResult, LatencyResult, MemoryResult

HOSTILE = "</title><script>\"'&"


def run(label: str, speed: float, *, classifies: bool = False) -> EngineRun:
    return EngineRun(
        label=label,
        precision="float32",
        weight_bytes=int(8e6 / speed),
        memory=MemoryResult(peak_bytes=400, before_loading_bytes=300, added_bytes=100, device_peak_bytes=None),
        work=PromisedWork(pass_flops=1e6 / speed, step_bytes=None if classifies else 4e6 / speed),
        pass_seconds=spread([0.1 / speed]),
        latency=None if classifies else LatencyResult(prefill=rates([900 * speed]), decode=rates([90 * speed])),
        forward=ForwardResult(rows=rates([9 * speed]), tokens=rates([90 * speed])) if classifies else None,
    )


def bench(*labels: str, classifies: bool = False) -> BenchResults:
    runs = compared([run(label, 1 + index, classifies=classifies) for index, label in enumerate(labels)])
    generation = GenerationConfig(prompt_length=8, new_tokens=0 if classifies else 32)
    return BenchResults(
        settings=BenchConfig(models=("one",), generation=generation),
        machine={"threads": 1, "accelerator": None},
        models=tuple(ModelFacts(label=label, reference=label, parameters=9, block_parameters=8) for label in labels),
        engines=(EngineResult(engine="torch", version="2", runs=runs),),
    )


@pytest.mark.parametrize("classifies", [True, False])
def test_the_page_says_how_much_faster_and_names_every_model(classifies: bool) -> None:
    page = read_page(bench_html(bench("dense", "pruned", HOSTILE, classifies=classifies), "now"))
    doing, bound = ("classifies", "FLOPs") if classifies else ("generates", "bytes")
    assert f"{doing} 3.00 times as fast as dense, where its {bound} promise 3.00 times." in page.text
    assert {"dense", "pruned"} <= page.names_beside_points()
    assert f"In torch, {HOSTILE}" in page.texts
    assert "accelerator" not in page.texts


def test_a_model_alone_is_told_by_its_speed() -> None:
    page = read_page(bench_html(bench("dense"), "now"))
    assert "generates 90 tokens a second from 8.00 MB of weights." in page.text
