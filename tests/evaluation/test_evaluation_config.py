"""eval, sweep and bench by flags, by a file, and by what `spine.json` says that they were asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from spinecli.app import app
from spinecli.artifacts.manifest import Manifest, read_manifest
from spinecli.config import Config, read_config
from spinecli.errors import OptionError
from spinecli.evaluation.bench.config import BenchConfig
from spinecli.evaluation.config import EvaluateConfig, GenerationConfig, PerplexityConfig, TaskConfig, TextConfig
from spinecli.evaluation.results import MemoryResult
from spinecli.evaluation.sweep.config import AfterCut, SweepConfig
from spinecli.exports.config import Quantization

ASKED: dict[str, tuple[str, ...]] = {
    "eval": (
        *("model", "--against", "one", "--against", "two", "--adapter", "lora", "--perplexity", "a.txt"),
        *("--perplexity", "b.txt", "--window", "64", "--stride", "16", "--special-tokens", "none"),
        *("--tasks", "arc_easy, piqa", "--tasks", "mmlu_*", "--include-path", "tasks", "--num-fewshot", "0"),
        *("--batch-size", "2", "--seed", "7", "--labelled", "data.csv", "--max-length", "32", "--no-latency"),
        *("--memory", "--sequences", "3", "--new-tokens", "4", "--threads", "1", "--dtype", "bfloat16"),
    ),
    "sweep": (
        *("model", "--sparsity", "0.05,0.1..0.5", "--step", "0.2", "--methods", "spine:adaptive,flap", "--tune", "lsq"),
        *("--perplexity", "a.txt", "--rows", "3", "--calibration", "b.txt", "--calibration-rows", "8", "--keep"),
    ),
    "bench": (
        *("one", "two.gguf", "--engine", "llama.cpp", "--quantize", "q8_0", "--batch-size", "2", "--threads", "4"),
        *("--prompt-length", "9", "--device", "cpu"),
    ),
}


def spine(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def written(place: Path, values: object) -> Path:
    place.write_text(yaml.safe_dump(values))
    return place


@pytest.mark.parametrize("command", ASKED)
@pytest.mark.parametrize("everything", [True, False])
def test_what_print_config_prints_asks_for_the_same(command: str, everything: bool, tmp_path: Path) -> None:
    asked = ASKED[command] if everything else ASKED[command][: 3 if command == "sweep" else 1]
    printed = spine(command, *asked, "--print-config")
    assert (printed.exit_code, printed.stderr) == (0, "")
    (tmp_path / "asked.yaml").write_text(printed.stdout)
    again = spine(command, "--config", tmp_path / "asked.yaml", "--print-config")
    assert (again.exit_code, again.stdout) == (0, printed.stdout)


def test_flags_reach_their_fields() -> None:
    def asked(command: str) -> Any:
        return yaml.safe_load(spine(command, *ASKED[command], "--print-config").stdout)

    evaluation = EvaluateConfig.model_validate(asked("eval"))
    texts = PerplexityConfig.model_validate(
        {"texts": ("a.txt", "b.txt"), "window": 64, "stride": 16, "special_tokens": "none"}
    )
    tasks = TaskConfig(
        names=("arc_easy", "piqa", "mmlu_*"), include_path=Path("tasks"), num_fewshot=0, batch_size=2, seed=7
    )
    assert (evaluation.against, evaluation.adapter) == (("one", "two"), Path("lora"))
    assert (evaluation.perplexity, evaluation.tasks) == (texts, tasks)
    assert evaluation.labelled is not None
    assert (evaluation.labelled.data, evaluation.labelled.max_length) == ("data.csv", 32)
    assert evaluation.generation == GenerationConfig(batch_size=3, new_tokens=4)
    assert (evaluation.latency, evaluation.memory, evaluation.dtype) == (False, True, "bfloat16")
    sweep = SweepConfig.model_validate(asked("sweep"))
    assert (sweep.sparsities, sweep.methods) == ((0.05, 0.1, 0.3, 0.5), ("spine:adaptive", "flap"))
    assert (sweep.tune, sweep.keep, sweep.calibration.rows) == (AfterCut.lsq, True, 8)
    assert sweep.perplexity == TextConfig(texts=("a.txt",), rows=3)
    bench = BenchConfig.model_validate(asked("bench"))
    assert (bench.models, bench.engine, bench.quantize) == (("one", "two.gguf"), "llama.cpp", Quantization.q8_0)
    assert bench.generation == GenerationConfig(batch_size=2, prompt_length=9)


@pytest.mark.parametrize(
    ("command", "kind"), [("eval", EvaluateConfig), ("sweep", SweepConfig), ("bench", BenchConfig)]
)
@pytest.mark.parametrize("everything", [True, False])
def test_a_config_in_flags_is_the_same_config(command: str, kind: type[Config], everything: bool) -> None:
    asked = ASKED[command] if everything else ASKED[command][: 3 if command == "sweep" else 1]
    config = kind.model_validate(yaml.safe_load(spine(command, *asked, "--print-config").stdout))
    again = spine(command, *config.arguments(), "--print-config")
    assert kind.model_validate(yaml.safe_load(again.stdout)) == config


def test_a_flag_takes_the_place_of_what_the_file_says(tmp_path: Path) -> None:
    file = written(tmp_path / "asked.yaml", {"model": "m", "sparsity": [0.1, 0.2], "perplexity": {"rows": 3}})
    found = yaml.safe_load(
        spine("sweep", "--config", file, "--sparsity", "0.3", "--window", 9, "--print-config").stdout
    )
    assert (found["sparsity"], found["perplexity"]) == ("0.3", {"texts": [], "window": 9, "rows": 3})


@pytest.mark.parametrize(
    ("command", "values", "sentence"),
    [
        ("eval", {"model": "m", "perplexity": {"window": 1}}, "--window must be at least 2, not 1."),
        ("eval", {"model": "m", "tasks": {"limit": 3}}, "--limit belongs to --tasks, which is not given; add it."),
        ("eval", {"model": "m", "tasks": {"names": []}}, "--tasks names no task; write names separated by commas."),
        ("eval", {"model": "m", "labelled": {}}, "--labelled is missing: "),
        ("eval", {"model": "m", "generation": {"batch_size": 0}}, "--sequences must be at least 1, not 0."),
        ("sweep", {"model": "m", "sparsity": 0.3, "step": 0.1}, "--step belongs to a range"),
        ("sweep", {"model": "m", "sparsity": 0.3, "stride": 2}, "There is no option stride"),
        ("bench", {"models": []}, "MODELS names no model; name one or several."),
        ("bench", {"models": ["m"], "generation": {"batch_size": 0}}, "--batch-size must be at least 1, not 0."),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_file_is_told_by_its_flag(
    command: str, values: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    done = spine(command, "--config", written(tmp_path / "asked.yaml", values), "--out", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sentence}")
    assert "asked.yaml" in done.stderr


@pytest.mark.parametrize("perplexity", [{}, {"rows": 3}])
def test_perplexity_without_a_text_needs_one_beside_another_measure(dense: Path, perplexity: dict[str, int]) -> None:
    from spinecli.evaluation.session import open_session

    config = read_config(EvaluateConfig, None, {"model": str(dense), "latency": True, "perplexity": perplexity})
    with pytest.raises(OptionError, match="--perplexity"):
        open_session(config)


def repeated(command: str, asked: tuple[object, ...], folder: Path) -> tuple[Manifest, Manifest]:
    """The manifests of a command run by flags, and by the config that the first one keeps."""
    for name in ("first", "second"):
        done = spine(command, *asked, "--out", folder / name, "--quiet", "--json")
        assert done.exit_code == 0, done.stderr
        json.loads(done.stdout)
        kept = read_manifest(folder / name).config
        asked = ("--config", written(folder / "kept.yaml", kept))
    return read_manifest(folder / "first"), read_manifest(folder / "second")


def test_what_an_evaluation_keeps_of_its_options_repeats_it(
    dense: Path, thinner: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = (thinner, "--against", dense, "--perplexity", text_file, "--stride", 16, "--rows", 3, "--threads", 1)
    first, second = repeated("eval", asked, tmp_path)
    assert (second.config, second.parameters) == (first.config, first.parameters)
    # the report says when it was measured
    assert second.outputs["results.json"] == first.outputs["results.json"]
    # what depended on the models is not among what was asked
    assert EvaluateConfig.model_validate(first.config).perplexity == PerplexityConfig(
        texts=(str(text_file),), stride=16, rows=3
    )
    assert (first.parameters["stride"], first.parameters["tasks"], first.parameters["dtype"]) == (16, None, "float32")
    assert "perplexity" not in first.parameters


def test_what_a_sweep_keeps_of_its_options_repeats_it(tmp_path: Path) -> None:
    small = ("--calibration-rows", 8, "--calibration-length", 32, "--window", 64, "--rows", 4)
    asked = ("builtin:tiny", "--sparsity", "0.2..0.5", "--step", "0.3", "--methods", "magnitude", "--tune", "none")
    first, second = repeated("sweep", (*asked, *small), tmp_path)
    assert (second.config, second.digest) == (first.config, first.digest)
    assert (first.config["sparsity"], first.parameters["sparsity"]) == ("0.2..0.5", [0.2, 0.5])


def test_what_a_benchmark_keeps_of_its_options_repeats_it(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryResult(peak_bytes=3, before_loading_bytes=1, added_bytes=2, device_peak_bytes=None)
    monkeypatch.setattr("spinecli.evaluation.session.measure_memory", lambda *_: memory)
    asked = (dense, dense, "--engine", "torch", "--new-tokens", 3, "--repeats", 2, "--threads", 1)
    first, second = repeated("bench", asked, tmp_path)
    assert (second.config, second.parameters) == (first.config, first.parameters)
    config = BenchConfig.model_validate(first.config)
    assert (config.generation.prompt_length, first.parameters["prompt_length"]) == (None, 93)


def test_the_configs_cost_nothing_to_import() -> None:
    code = (
        "import sys, spinecli.evaluation.config, spinecli.evaluation.sweep.config, spinecli.evaluation.bench.config; "
        "print(sorted({'torch', 'transformers', 'lm_eval', 'gguf', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
