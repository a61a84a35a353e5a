from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from families import classifier, recipe
from typer.testing import CliRunner

from spinecli.artifacts.manifest import damaged_files, read_manifest
from spinecli.commands.bench import bench
from spinecli.errors import MissingPackageError
from spinecli.evaluation.bench.results import BenchResults
from spinecli.evaluation.results import MemoryResult

app = typer.Typer(pretty_exceptions_enable=False)
app.command("bench")(bench)

SHORT = ("--prompt-length", 6, "--new-tokens", 3, "--repeats", 2, "--threads", 1)
IN_TORCH = ("--engine", "torch", *SHORT)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the process that measures memory, which the test of the installed command starts."""
    found = MemoryResult(peak_bytes=3, before_loading_bytes=1, added_bytes=2, device_peak_bytes=None)
    monkeypatch.setattr("spinecli.evaluation.session.measure_memory", lambda *_: found)


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if llama-cpp-python were not installed."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_is_light_until_it_runs() -> None:
    heavy = {"torch", "transformers", "llama_cpp", "gguf"}
    code = f"import sys, spinecli.commands.bench; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_installed_command_on_the_built_in_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spinecli", "bench", "builtin:tiny", "builtin:tiny", *map(str, IN_TORCH)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--batch-size", "2", "--json", "--out", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    results = BenchResults.model_validate(json.loads(done.stdout))
    assert (results.settings.generation.batch_size, results.settings.generation.prompt_length) == (2, 6)
    assert [model.label for model in results.models] == ["builtin:tiny", "builtin:tiny (2)"]
    assert results.machine["threads"] == 1
    (engine,) = results.engines
    first, second = engine.runs
    assert first.speedups is None
    assert second.speedups is not None
    assert second.speedups.prefill is not None
    assert second.speedups.prefill.promised == 1.0
    assert first.latency is not None
    assert second.latency is not None
    for own, other, ratio in zip(
        second.latency.prefill.samples,
        first.latency.prefill.samples,
        second.speedups.prefill.measured.samples,
        strict=True,
    ):
        assert ratio == pytest.approx(own / other)
    # two prompts of six tokens
    assert first.pass_seconds.samples[0] == pytest.approx(12 / first.latency.prefill.samples[0])
    assert first.weight_bytes == 4 * results.models[0].parameters
    assert first.memory.peak_bytes > first.memory.added_bytes > 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.kind, manifest.command) == ("benchmark", "bench")
    assert set(manifest.outputs) == {"results.json", "report.html"}
    assert set(manifest.inputs) == {"model 1", "model 2"}
    assert damaged_files(tmp_path / "out", manifest) == {}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(done.stdout)


def test_a_table_for_a_person(dense: Path, thinner: Path, no_probe: None) -> None:
    result = _run(dense, thinner, *IN_TORCH)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("torch (")
    assert lines[1].split() == ["dense", "thinner"]
    rows = {line[:26].strip(): line[26:].split() for line in lines[2:]}
    for figure in ("peak memory", "time to first token, ms", "prefill, tokens/s", "decode, tokens/s"):
        assert figure in rows
    assert rows["×, promised by FLOPs"][0] == rows["×, promised by bytes"][0] == "-"
    assert float(rows["×, promised by FLOPs"][1]) > 1
    assert "Generation: 6 + 3 tokens, batch 1; torch on cpu; threads: 1." in result.stdout
    assert result.stderr == ""


def test_one_model_has_no_ratios(dense: Path, no_probe: None) -> None:
    result = _run(dense, *IN_TORCH)
    assert "×" not in result.stdout
    assert "in turns" not in result.stdout


def test_classifiers_are_timed_on_one_batch(tmp_path: Path, no_probe: None) -> None:
    wide, narrow = (classifier("bert", channels=channels).write(tmp_path / f"bert{channels}") for channels in (64, 32))
    found = _run(wide, narrow, *SHORT, "--batch-size", 3, "--json")
    (engine,) = json.loads(found.stdout)["engines"]
    second = engine["runs"][1]
    assert second["latency"] is None
    assert second["work"]["step_bytes"] is None
    assert second["speedups"]["forward"]["promised"] > 1
    assert second["pass_seconds"]["samples"][0] == pytest.approx(3 / second["forward"]["rows"]["samples"][0])
    drawn = _run(wide, narrow, *SHORT)
    assert "time of a batch, ms" in drawn.stdout
    assert "One pass: rows of 6 tokens" in drawn.stdout
    assert drawn.stderr == ""


def test_without_llama_cpp_torch_runs_and_says_why(dense: Path, no_llama_cpp: None, no_probe: None) -> None:
    result = _run(dense, *SHORT)
    assert result.exit_code == 0
    assert "In torch only. llama.cpp needs llama-cpp-python (not installed)" in result.stderr
    assert _run(dense, *SHORT, "--quiet").stderr == ""


def test_what_cannot_be_exported_stays_out_unless_it_was_asked_for(
    dense: Path, monkeypatch: pytest.MonkeyPatch, no_probe: None
) -> None:
    def refused(*_: object) -> None:
        raise MissingPackageError("no way to write it.")

    monkeypatch.setattr("spinecli.evaluation.bench.session.import_llama_cpp", lambda: None)
    monkeypatch.setattr("spinecli.evaluation.bench.session.convertible", refused)
    result = _run(dense, *SHORT, "--json")
    assert "dense is left out in llama.cpp: no way to write it." in result.stderr
    assert [engine["engine"] for engine in json.loads(result.stdout)["engines"]] == ["torch"]
    asked = _run(dense, *SHORT, "--engine", "all")
    assert (asked.exit_code, asked.stderr) == (2, "error: no way to write it.\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent"], "absent does not exist"),
        (["absent.gguf"], "absent.gguf does not exist"),
        (["DENSE", "ABSENT/no.gguf"], "no.gguf does not exist"),
        (["TEXT"], "text.gguf is not a whole GGUF file"),
        (["DENSE", "CLASSIFIER"], "which no measure compares"),
        (["DENSE", "--prompt-length", "120"], "exceed the 128 positions of dense; lower --prompt-length"),
        (["DENSE", "--device", "gpu"], "--device gpu cannot be used here"),
        (["CLASSIFIER", "--engine", "llama.cpp"], "is a classifier, which llama.cpp does not run"),
        (["DENSE", "--out", "ABSENT/out"], "does not exist"),
        (["DENSE", "--engine", "onnx"], "--engine must be one of torch, llama.cpp, all, not 'onnx'"),
        (["--engine", "torch"], "MODELS is missing: "),
    ],
)
def test_mistakes_get_one_sentence(dense: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "text.gguf").write_text("no such format " * 50)
    named = {
        "DENSE": dense,
        "TEXT": tmp_path / "text.gguf",
        "ABSENT": tmp_path / "absent",
        "CLASSIFIER": tmp_path / "bert",
    }
    if "CLASSIFIER" in arguments:
        recipe("bert", task="classification").write(tmp_path / "bert")
    given = [str(named.get(word.split("/")[0], word)) + word[word.find("/") :] * ("/" in word) for word in arguments]
    result = _run(*given)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert sentence in result.stderr
    assert "Traceback" not in result.output


def test_a_gguf_file_needs_llama_cpp(gguf_file: Path, dense: Path, no_llama_cpp: None) -> None:
    alone = _run(gguf_file, *SHORT)
    assert alone.exit_code == 2
    assert "llama.cpp needs llama-cpp-python (not installed); install it" in alone.stderr
    in_torch = _run(dense, gguf_file, *IN_TORCH)
    assert in_torch.exit_code == 2
    assert "dense.gguf runs in llama.cpp only; use --engine llama.cpp or --engine all." in in_torch.stderr


def test_an_existing_output_is_refused_before_anything_is_measured(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinecli.evaluation.bench.session.BenchSession.measure", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    result = _run(dense, *IN_TORCH, "--out", tmp_path / "mine", "--overwrite")
    assert result.exit_code == 2
    assert "holds files that spine did not write" in result.stderr


def test_an_output_is_replaced_only_where_that_is_allowed(dense: Path, tmp_path: Path, no_probe: None) -> None:
    asked = (dense, *IN_TORCH, "--out", tmp_path / "out")
    assert _run(*asked).exit_code == 0
    refused = _run(*asked)
    assert refused.exit_code == 2
    assert "add --overwrite" in refused.stderr
    assert _run(*asked, "--overwrite").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
