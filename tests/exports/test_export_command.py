from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import EXPORTED, field_of
from families import Recipe, answers, load, random_tokens, recipe
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from spinecli.app import app
from spinecli.artifacts.manifest import sha256_file
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream import whole_model
from spinecli.exports import llamacpp, run
from spinecli.exports.merging import merge

Written = Callable[[Recipe], Path]
BASE = recipe("llama", grouped=True, tied=True)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "available", lambda: False)


def export(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    done = export(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith((".", "'spinecli[gguf]'"))
    return line


def lora_of(directory: Path, base: Path) -> Path:
    torch.manual_seed(0)
    adapted = get_peft_model(load(base), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(directory)
    return directory


def test_the_command_is_light_until_it_runs() -> None:
    heavy = {"torch", "transformers", "peft", "gguf", "llama_cpp", "numpy"}
    code = f"import sys, spinecli.commands.export; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.usefixtures("_without_llama_cpp")
def test_a_table_for_a_person(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    done = export(
        written(recipe("llama", channels=40, tied=True)), "--format", "gguf", "--out", out, "--quantize", "q8_0"
    )
    assert done.exit_code == 0, done.output
    for word in ("gguf, llama", "q8_0", "byte-level BPE, 320 tokens, gpt-2", sha256_file(out), str(out)):
        assert word in done.stdout
    assert "f16 instead of q8_0, as their rows are no multiple of 32: blk.0.ffn_down.weight, blk.1" in done.stdout
    assert "pip install llama-cpp-python" in done.stdout


@pytest.mark.usefixtures("_without_llama_cpp")
def test_json_for_a_program(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    done = export(written(BASE), "--format", "gguf", "--out", out, "--json", "--quiet")
    report = json.loads(done.stdout)
    assert report["sha256"] == sha256_file(out)
    assert report["bytes"] == out.stat().st_size
    assert report["architecture"] == "llama"
    assert report["tensors"] == {"f16": 22, "f32": 7}
    assert report["fallen_back_to_f16"] == report["filled_blocks"] == report["notes"] == []
    assert report["llama_cpp"] is None


@pytest.mark.usefixtures("_without_llama_cpp")
def test_the_same_command_gives_the_same_bytes(written: Written, tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert export(written(BASE), "--format", "gguf", "--out", tmp_path / out, "--quiet").exit_code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.slow
def test_llama_cpp_checks_the_file(written: Written, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    adapter = lora_of(tmp_path / "lora", written(BASE))
    done = export(
        written(BASE),
        "--format",
        "gguf",
        "--out",
        tmp_path / "x.gguf",
        "--adapter",
        adapter,
        "--json",
        "--quantize",
        "f32",
    )
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["llama_cpp"]["logit_difference"] < 5e-3
    assert report["llama_cpp"]["texts"] == report["llama_cpp"]["texts_alike"] == len(llamacpp.TEXTS)
    assert report["adapter"] == {"path": str(adapter), "merged_tensors": 6}


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_published(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr("spinecli.exports.layout.changed", lambda value, change, head_dim: value)
    done = export(written(BASE), "--format", "gguf", "--out", tmp_path / "x.gguf")
    assert done.exit_code == 1
    assert "logits differ" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plain_directory(written: Written, tmp_path: Path) -> None:
    source = shutil.copytree(written(BASE), tmp_path / "source")
    for name in ("spine.json", "masks.safetensors", "scores.safetensors", "scales.safetensors"):
        (source / name).write_bytes(b"spine's own")
    adapter, out = lora_of(tmp_path / "lora", source), tmp_path / "plain"
    done = export(source, "--format", "hf", "--out", out, "--adapter", adapter, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["logit_difference"] < 1e-4
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    from peft import PeftModel

    tokens = random_tokens(2, 20)
    expected = answers(PeftModel.from_pretrained(load(source), adapter).eval(), tokens)
    torch.testing.assert_close(answers(load(out), tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_grown_vocabulary_comes_with_its_tokenizer(written: Written, tmp_path: Path) -> None:
    source, adapter, out = written(BASE), tmp_path / "lora", tmp_path / "plain"
    model, tokenizer = load(source), AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<ours>"])
    model.resize_token_embeddings(330, mean_resizing=False)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    done = export(source, "--format", "hf", "--out", out, "--adapter", adapter)
    assert done.exit_code == 0, done.output
    assert "<ours>" in AutoTokenizer.from_pretrained(out).get_vocab()
    assert (out / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert load(out).get_input_embeddings().weight.shape[0] == 330


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_weights_are_rounded_to_the_stored_precision(tmp_path: Path, dtype: str) -> None:
    source = recipe("llama", grouped=True, dtype=dtype).write(tmp_path / "source")
    adapter, out = lora_of(tmp_path / "lora", source), tmp_path / "plain"
    assert export(source, "--format", "hf", "--out", out, "--adapter", adapter).exit_code == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    found = Checkpoint.open(out).read(name)
    assert found.dtype is getattr(torch, dtype)
    exact = merge(Checkpoint.open(source), adapter).read(name)
    assert torch.equal(found, exact.to(found.dtype))
    assert not torch.equal(found.float(), exact)


def test_a_shipped_modelling_file_stays(written: Written, tmp_path: Path) -> None:
    narrow = recipe("narrow_bert", heads=3, task="encoding")
    assert export(written(narrow), "--format", "hf", "--out", tmp_path / "plain").exit_code == 0
    assert (tmp_path / "plain" / "modeling_narrow_encoder.py").is_file()


def test_an_output_that_is_there_is_refused_or_replaced(written: Written, tmp_path: Path) -> None:
    for kind, out in (("gguf", tmp_path / "x.gguf"), ("hf", tmp_path / "plain")):
        arguments = (written(BASE), "--format", kind, "--out", out)
        assert export(*arguments).exit_code == 0
        assert f"{out} exists; add --overwrite" in refusal(*arguments)
        assert export(*arguments, "--overwrite").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "x.gguf"]


def test_mistakes_get_one_sentence_and_leave_nothing(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base = tmp_path / "x", written(BASE)
    gguf = ("--format", "gguf", "--out", out)
    assert "--format must be one of gguf, hf, not 'onnx'" in refusal(base, "--format", "onnx", "--out", out)
    assert "--quantize must be one of f32, f16, q8_0, q4_0, not 'q5_k'" in refusal(base, *gguf, "--quantize", "q5_k")
    assert "--quantize is for --format gguf" in refusal(base, "--format", "hf", "--out", out, "--quantize", "f16")
    assert "does not exist" in refusal(tmp_path / "nothing", *gguf)
    assert "use --format hf" in refusal(written(recipe("opt", tied=True)), *gguf)
    assert "classification" in refusal(written(recipe("llama", task="classification")), *gguf)
    assert "is not a directory" in refusal(base, *gguf, "--adapter", tmp_path / "nothing")
    assert "has no adapter_config.json" in refusal(base, *gguf, "--adapter", base)
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert "pip install 'spinecli[gguf]'" in refusal(base, *gguf)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_base_is_named(written: Written, tmp_path: Path) -> None:
    adapter = lora_of(tmp_path / "lora", written(BASE))
    line = refusal(
        written(recipe("llama", channels=48)), "--format", "gguf", "--out", tmp_path / "x", "--adapter", adapter
    )
    assert "name the checkpoint that it was trained on" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("_without_llama_cpp")
def test_an_interruption_leaves_nothing(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("spinecli.exports.gguf_file.write_gguf", interrupted)
    done = export(written(BASE), "--format", "gguf", "--out", tmp_path / "x.gguf")
    assert done.exit_code == 130
    assert done.stderr == "error: Stopped.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_without_llama_cpp")
def test_what_llama_cpp_treats_otherwise_is_noted(written: Written, tmp_path: Path) -> None:
    window, _ = EXPORTED["mistral window"]
    done = export(written(window), "--format", "gguf", "--out", tmp_path / "x.gguf")
    assert done.stderr.startswith("note: the context is cut to 6 tokens")
    done = export(written(window), "--format", "gguf", "--out", tmp_path / "y.gguf", "--quiet")
    assert done.stderr == ""


@pytest.mark.usefixtures("_without_llama_cpp")
def test_a_model_is_never_loaded_whole(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read when their turn comes, and never more of them together than a block has."""
    import weakref

    read, alive, most = Checkpoint.read, weakref.WeakSet[torch.Tensor](), 0

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        value = read(self, name)
        alive.add(value)
        most = max(most, len(alive))
        return value

    monkeypatch.setattr(Checkpoint, "read", counted)
    monkeypatch.setattr(whole_model, "WHOLE_MODEL_BYTES", 0)
    assert export(written(BASE), "--format", "gguf", "--out", tmp_path / "x.gguf").exit_code == 0
    assert 1 <= most <= 9
    assert field_of(tmp_path / "x.gguf", "llama.block_count") == 3
