"""llama.cpp itself; left out where llama-cpp-python is absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import load, random_tokens

from spinecli.errors import MeasurementError, NoSpaceError
from spinecli.evaluation.bench.config import BenchConfig
from spinecli.evaluation.bench.llama_cpp_engine import load_llama_cpp
from spinecli.evaluation.bench.session import open_bench
from spinecli.evaluation.config import GenerationConfig
from spinecli.evaluation.memory import run_probe

pytest.importorskip("llama_cpp")

LENGTH, NEW = 12, 10
GENERATION = GenerationConfig(prompt_length=LENGTH, new_tokens=4, batch_size=2, repeats=2)


def test_every_row_of_a_batch_goes_on_as_torch_goes_on_alone(dense: Path, gguf_file: Path) -> None:
    prompt = random_tokens(3, LENGTH)
    with load_llama_cpp(gguf_file, reference="dense", rows=3, length=LENGTH, new_tokens=NEW, threads=1) as model:
        found = model.generate(prompt.tolist(), NEW)
        again = model.generate(prompt.tolist(), NEW)
    assert found == again
    reference = load(dense)
    for row, tokens in zip(prompt, found, strict=True):
        with torch.no_grad():
            greedy = reference.generate(row[None], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        assert tokens == greedy[0, LENGTH:].tolist()


def test_nothing_is_said_on_the_terminal(gguf_file: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from spinecli.evaluation.bench.llama_cpp_engine import load_llama_cpp\n"
        f"with load_llama_cpp(\n"
        f"    Path({str(gguf_file)!r}), reference='dense', rows=1, length=2, new_tokens=2, threads=1\n"
        ") as model:\n"
        "    model.generate([[5, 6]], 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_probe_holds_llama_cpp_and_no_torch(gguf_file: Path) -> None:
    request = {"file": str(gguf_file), "reference": "dense", "prompt": [[5, 6, 7]], "new_tokens": 3, "threads": 1}
    found = run_probe("spinecli.evaluation.bench.llama_cpp_probe", request, "dense")
    assert found.peak_bytes == found.before_loading_bytes + found.added_bytes
    assert gguf_file.stat().st_size < found.added_bytes < 200e6
    code = "import sys, spinecli.evaluation.bench.llama_cpp_probe; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_file_that_llama_cpp_refuses_ends_with_its_reason(gguf_file: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(gguf_file.read_bytes().replace(b"llama", b"lemma"))
    bench = open_bench(BenchConfig(models=(str(unknown),), generation=GENERATION, threads=1))
    with pytest.raises(MeasurementError, match=r"^llama.cpp cannot open .*unknown.gguf \(.*'lemma'\)"):
        bench.measure()


def test_checkpoints_and_files_side_by_side(
    dense: Path, thinner: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    models = (str(dense), str(thinner), str(gguf_file))
    results = open_bench(BenchConfig(models=models, generation=GENERATION, threads=1)).measure()
    in_torch, in_llama_cpp = results.engines
    assert [run.label for run in in_torch.runs] == ["dense", "thinner"]
    assert [run.label for run in in_llama_cpp.runs] == ["dense", "thinner", "dense.gguf"]
    assert [run.precision for run in in_llama_cpp.runs] == ["f16", "f16", "f32"]
    assert in_llama_cpp.runs[0].speedups is None
    for run in in_llama_cpp.runs[1:]:
        assert run.speedups is not None
        assert run.speedups.decode is not None
        assert len(run.speedups.decode.measured.samples) == 2
    thinner_run, file_run = in_llama_cpp.runs[1:]
    assert thinner_run.work.pass_flops < in_llama_cpp.runs[0].work.pass_flops == file_run.work.pass_flops
    assert in_llama_cpp.runs[0].weight_bytes < 0.6 * file_run.weight_bytes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NoSpaceError("full")])
def test_an_interruption_leaves_no_file(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    seen: list[Path] = []

    def interrupted(*_: object) -> None:
        seen.extend(tmp_path.rglob("*.gguf"))
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("spinecli.evaluation.bench.session.bench_llama_cpp", interrupted)
    with pytest.raises(type(error)):
        open_bench(BenchConfig(models=(str(dense),), engine="llama.cpp", generation=GENERATION)).measure()
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_interrupted_command_leaves_nothing(tmp_path: Path) -> None:
    import os
    import signal
    import time

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "spinecli", "bench", "builtin:tiny", "--engine", "llama.cpp"]
    asked = ["--prompt-length", "200", "--new-tokens", "50", "--repeats", "500", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *asked], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(temporary.rglob("*.gguf")):
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.strip() == "error: Stopped."
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_json_of_the_command(gguf_file: Path) -> None:
    command = [sys.executable, "-m", "spinecli", "bench", str(gguf_file), "--json", "--repeats", "1"]
    asked = ["--prompt-length", "4", "--new-tokens", "2", "--threads", "1"]
    done = subprocess.run([*command, *asked], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [engine["engine"] for engine in found["engines"]] == ["llama.cpp"]
    assert found["engines"][0]["runs"][0]["latency"]["decode"]["median"] > 0
    assert done.stderr == ""
