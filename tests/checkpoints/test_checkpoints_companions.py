"""What travels with a checkpoint, by the lists of files of published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spinecli.checkpoints.writer import companions
from spinecli.errors import UnsafeFileError

WEIGHTS = "config.json model.safetensors README.md .gitattributes"
# layout -> (files that a loader of the directory reads, files that it does not or that are another form of the weights)
LAYOUTS = {
    "llama 3": (
        "LICENSE USE_POLICY.md generation_config.json special_tokens_map.json tokenizer.json tokenizer_config.json",
        f"{WEIGHTS} original/consolidated.00.pth original/params.json original/tokenizer.model",
    ),
    "mistral": (
        "generation_config.json tekken.json tokenizer.json tokenizer.model tokenizer.model.v3 tokenizer_config.json "
        "special_tokens_map.json chat_template.jinja",
        f"{WEIGHTS} consolidated.safetensors params.json",
    ),
    "gemma 3": (
        "added_tokens.json chat_template.jinja generation_config.json special_tokens_map.json tokenizer.json "
        "tokenizer.model tokenizer_config.json preprocessor_config.json processor_config.json",
        WEIGHTS,
    ),
    "qwen 3": ("LICENSE generation_config.json merges.txt tokenizer.json tokenizer_config.json vocab.json", WEIGHTS),
    "phi 3": (
        "LICENSE NOTICE.md added_tokens.json generation_config.json special_tokens_map.json tokenizer.json "
        "tokenizer.model tokenizer_config.json",
        f"{WEIGHTS} configuration_phi3.py modeling_phi3.py sample_finetune.py CODE_OF_CONDUCT.md SECURITY.md",
    ),
    "smollm 3": (
        "chat_template.jinja additional_chat_templates/tool_use.jinja additional_chat_templates/rag.jinja "
        "generation_config.json special_tokens_map.json tokenizer.json tokenizer_config.json",
        f"{WEIGHTS} onnx/model.onnx runs/events.out.tfevents.1 training_args.bin",
    ),
    "gpt-2": (
        "generation_config.json merges.txt tokenizer.json tokenizer_config.json vocab.json",
        f"{WEIGHTS} 64.tflite flax_model.msgpack pytorch_model.bin rust_model.ot tf_model.h5 onnx/config.json",
    ),
    "bert": (
        "LICENSE tokenizer.json tokenizer_config.json vocab.txt",
        f"{WEIGHTS} coreml/fill-mask/float32_model.mlpackage/Manifest.json pytorch_model.bin tf_model.h5",
    ),
    "minilm of sentence-transformers": (
        "1_Pooling/config.json 2_Dense/config.json 2_Dense/model.safetensors config_sentence_transformers.json "
        "modules.json sentence_bert_config.json special_tokens_map.json tokenizer.json tokenizer_config.json vocab.txt",
        f"{WEIGHTS} data_config.json onnx/model.onnx openvino/openvino_model.xml train_script.py",
    ),
    "bertweet": ("added_tokens.json bpe.codes vocab.txt", f"{WEIGHTS} pytorch_model.bin"),
    "opt of old": ("LICENSE dict.txt merges.txt vocab.json", f"{WEIGHTS} flax_model.msgpack"),
    "a tokenizer with code of its own": (
        "tokenization_own.py own_pieces.py own.tiktoken tokenizer_config.json generation_config.json",
        f"{WEIGHTS} modeling_own.py examples.py",
    ),
}
CONTENT = {
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]),
    "tokenization_own.py": "from .own_pieces import pieces\n",
    "own_pieces.py": "pieces = ()\n",
    "tokenizer_config.json": "{}",
}
OWN_CODE = json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None], "AutoProcessor": "a/b--c.D"}})


def laid_out(directory: Path, files: str, **content: str) -> Path:
    for name in files.split():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text({**CONTENT, **content}.get(name, "x"))
    return directory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_loader_reads_travels_along_and_nothing_else(tmp_path: Path, layout: str) -> None:
    read, other = LAYOUTS[layout]
    settings = {"tokenizer_config.json": OWN_CODE} if "own" in layout else {}
    directory = laid_out(tmp_path, f"{read} {other}", **settings)
    assert [str(path) for path in companions(directory)] == sorted(read.split())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", json.dumps([{"path": "../elsewhere"}])),
        ("modules.json", json.dumps([{"path": "/etc"}])),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["../../x.Own", None]}})),
    ],
)
def test_files_outside_the_directory_are_not_fetched(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UnsafeFileError, match="outside the checkpoint"):
        companions(tmp_path)
