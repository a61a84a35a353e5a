from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import tensors_of, written_gguf
from families import Recipe, load, random_tokens, recipe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.stream.verify import streamed_logits
from spinecli.checkpoints.tokenizer import padding_id, tokenizer_of
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.errors import DamagedArtifactError, OptionError
from spinecli.evaluation.models import load_model, open_subjects
from spinecli.exports.merging import merge
from spinecli.exports.run import write_huggingface

Opened = Callable[[Recipe], Checkpoint]
BASE = recipe("llama", grouped=True)


def adapter_in(directory: Path, model: PreTrainedModel, **settings: Any) -> PeftModel:
    """A LoRA adapter with random factors, saved by PEFT."""
    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**{**plain, **settings}))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            # not instead of what it begins with, from which some kinds have taken the base weights' part
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(directory)
    return adapted


SETTINGS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "ranks by pattern": {
        "rank_pattern": {r"layers\.0\..*q_proj": 2, "down_proj": 8},
        "alpha_pattern": {"down_proj": 3, r"model\.layers\.2\.self_attn\.v_proj": 1},
    },
    "some blocks": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "rank-stabilised": {"use_rslora": True},
    "a module trained whole": {"modules_to_save": ["lm_head"]},
}


KINDS: dict[str, dict[str, Any]] = {
    **SETTINGS,
    "weight-decomposed": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "EVA": {"init_lora_weights": "eva"},
    "biases": {"bias": "all"},
    "the embedding trained whole": {"modules_to_save": ["embed_tokens"]},
    "embedding and head trained whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding and head trained as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms trained whole": {"modules_to_save": ["norm", "input_layernorm"]},
    "some rows of the embedding": {"trainable_token_indices": [3, 5]},
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "decomposed factors of the embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "some rows of the embedding and others of the head": {
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7, 9]}
    },
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
    "a grown vocabulary": {"vocabulary": 330},
    "a grown vocabulary, trained whole": {"vocabulary": 330, "modules_to_save": ["embed_tokens", "lm_head"]},
    "a grown vocabulary, some rows": {"vocabulary": 330, "trainable_token_indices": [320, 329]},
    "a grown vocabulary, factors of the embedding": {"vocabulary": 330, "target_modules": ["embed_tokens"]},
}
BASES = {
    "untied": BASE,
    "tied": recipe("llama", grouped=True, tied=True),
    "biases": recipe("llama", grouped=True, extra=(("attention_bias", True), ("mlp_bias", True))),
}
CASES = [
    *(("untied", kind) for kind in KINDS if kind != "a grown vocabulary, factors of the embedding"),
    *(("tied", kind) for kind in KINDS),
    *(("biases", kind) for kind in ("one rank", "weight-decomposed", "biases")),
]


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_it_computes_what_pefts_loader_makes_of_it(opened: Opened, tmp_path: Path, base: str, kind: str) -> None:
    checkpoint, settings = opened(BASES[base]), KINDS[kind]
    directory, vocabulary = tmp_path / "lora", settings.get("vocabulary")
    plain = {key: value for key, value in settings.items() if key != "vocabulary"}
    model = load(checkpoint.path)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    adapter_in(directory, model, **plain)
    fresh = load(checkpoint.path)
    if vocabulary:
        fresh.resize_token_embeddings(vocabulary, mean_resizing=False)
    tokens = random_tokens(2, 20)
    tokens[0, :4] = torch.tensor([3, 5, *((320, 329) if vocabulary else (7, 9))])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(fresh, directory).eval()(tokens).logits
        assert not torch.allclose(load(checkpoint.path)(tokens.clamp(max=319)).logits, expected[..., :320], atol=1e-2)
    merged = merge(checkpoint, directory)
    torch.testing.assert_close(streamed_logits(merged, tokens), expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "merged").mkdir()
    write_checkpoint(tmp_path / "merged", merged.raw_config, merged.groups(), checkpoint.path)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "merged")(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    (subject,) = open_subjects([(str(checkpoint.path), directory)])
    with torch.no_grad():
        evaluated = load_model(subject, device="cpu", dtype="float32")(tokens).logits
    torch.testing.assert_close(evaluated, expected, rtol=1e-4, atol=1e-4)


def test_weights_that_are_stored_transposed(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("gpt2", tied=True))
    adapted = adapter_in(
        tmp_path / "lora", load(checkpoint.path), target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True
    )
    expected = adapted.merge_and_unload().state_dict()
    found = merge(checkpoint, tmp_path / "lora")
    for name in checkpoint.tensors:
        torch.testing.assert_close(found.read(name).float(), expected[name], rtol=0, atol=2e-6, msg=name)


def test_half_precision_is_merged_in_float32(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(recipe("llama", dtype="bfloat16").write(tmp_path / "checkpoint"))
    adapted = adapter_in(tmp_path / "lora", load(checkpoint.path))
    expected = adapted.merge_and_unload().state_dict()
    found = merge(checkpoint, tmp_path / "lora")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert found.read(name).dtype is torch.float32
    torch.testing.assert_close(found.read(name), expected[name], rtol=0, atol=2e-6)
    assert found.read("model.norm.weight").dtype is torch.bfloat16


def test_the_file_holds_the_merged_weights(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(BASE)
    adapted = adapter_in(tmp_path / "lora", load(checkpoint.path))
    written_gguf(tmp_path / "x.gguf", merge(checkpoint, tmp_path / "lora"))
    expected = adapted.merge_and_unload().state_dict()
    found = tensors_of(tmp_path / "x.gguf")
    for block in range(checkpoint.blocks):
        for long, short in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up")):
            wanted = expected[f"model.layers.{block}.{long}.weight"]
            torch.testing.assert_close(found[f"blk.{block}.{short}.weight"], wanted, rtol=0, atol=2e-6)


def test_an_adapter_with_a_head_makes_a_classifier(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(BASE)
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint.path, num_labels=5, pad_token_id=0)
    adapted = adapter_in(tmp_path / "lora", base, task_type="SEQ_CLS")
    found = merge(checkpoint, tmp_path / "lora")
    assert (found.task, found.labels) == (Task.classification, 5)
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
    torch.testing.assert_close(streamed_logits(found, tokens), expected, rtol=1e-4, atol=1e-4)


def test_an_exported_classifier_pads_and_answers_as_the_evaluated_one(opened: Opened, tmp_path: Path) -> None:
    directory = shutil.copytree(opened(BASE).path, tmp_path / "base")
    plain = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**plain, "pad_token_id": None}))
    checkpoint = Checkpoint.open(directory)
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint.path, num_labels=3, pad_token_id=0)
    adapter_in(tmp_path / "lora", base, task_type="SEQ_CLS")
    (tmp_path / "plain").mkdir()
    write_huggingface(tmp_path / "plain", merge(checkpoint, tmp_path / "lora"), RunContext())
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    (subject,) = open_subjects([(str(checkpoint.path), tmp_path / "lora")])
    evaluated = load_model(subject, device="cpu", dtype="float32")
    padding = padding_id(tokenizer_of(checkpoint))
    assert exported.config.pad_token_id == evaluated.config.pad_token_id == padding
    rows = random_tokens(2, 20).clamp_min(padding + 1)
    rows[1, 12:] = padding
    with torch.no_grad():
        torch.testing.assert_close(exported(rows).logits, evaluated(rows).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_may_tell_more_labels_apart_than_its_classifier(tmp_path: Path) -> None:
    base = recipe("roberta", task=Task.classification)
    checkpoint = Checkpoint.open(base.write(tmp_path / "checkpoint"))
    wider = AutoModelForSequenceClassification.from_pretrained(
        checkpoint.path, num_labels=7, ignore_mismatched_sizes=True
    )
    adapted = adapter_in(tmp_path / "lora", wider, task_type="SEQ_CLS", target_modules=["query", "value"])
    found = merge(checkpoint, tmp_path / "lora")
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
    assert (found.labels, expected.shape[1]) == (7, 7)
    torch.testing.assert_close(streamed_logits(found, tokens), expected, rtol=1e-4, atol=1e-4)
    (subject,) = open_subjects([(str(checkpoint.path), tmp_path / "lora")])
    with torch.no_grad():
        evaluated = load_model(subject, device="cpu", dtype="float32")(tokens).logits
    torch.testing.assert_close(evaluated, expected, rtol=1e-4, atol=1e-4)


def test_a_grown_vocabulary_without_its_head_is_refused_by_all(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(BASE)
    model = load(checkpoint.path)
    model.resize_token_embeddings(330, mean_resizing=False)
    adapter_in(tmp_path / "lora", model)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if "lm_head" not in name}, weights)
    with pytest.raises(OptionError, match=r"has no lm_head\.weight"):
        merge(checkpoint, tmp_path / "lora")
    (subject,) = open_subjects([(str(checkpoint.path), tmp_path / "lora")])
    with pytest.raises(OptionError, match=r"has no lm_head\.weight"):
        load_model(subject, device="cpu", dtype="float32")


def changed_config(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("other", [recipe("llama", grouped=True, channels=48), recipe("llama", grouped=True, blocks=2)])
def test_an_adapter_of_another_model_is_refused(opened: Opened, tmp_path: Path, other: Recipe) -> None:
    adapter_in(tmp_path / "lora", load(opened(BASE).path))
    with pytest.raises(OptionError, match=r"does not fit .*; name the checkpoint that it was trained on"):
        merge(opened(other), tmp_path / "lora")


def test_other_kinds_of_adapters_are_refused(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(BASE)
    adapter_in(tmp_path / "lora", load(checkpoint.path))
    kinds: dict[str, dict[str, Any]] = {
        "LOHA": {"peft_type": "LOHA"},
        "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
        "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
        "lora_bias": {"lora_bias": True},
        "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
        "corda": {"init_lora_weights": "corda"},
        "loftq": {"init_lora_weights": "loftq"},
        "of-tomorrow": {"init_lora_weights": "of-tomorrow"},
        "a_field_of_tomorrow": {"a_field_of_tomorrow": 3},
    }
    for word, changes in kinds.items():
        shutil.copytree(tmp_path / "lora", tmp_path / word)
        changed_config(tmp_path / word, **changes)
        with pytest.raises(OptionError, match=word):
            merge(checkpoint, tmp_path / word)


def test_a_lone_factor_and_nan_are_refused(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(BASE)
    adapter_in(tmp_path / "lora", load(checkpoint.path))
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    lone = dict(tensors)
    lone.pop(next(name for name in tensors if name.endswith("lora_B.weight")))
    save_file(lone, weights)
    with pytest.raises(OptionError, match="is missing"):
        merge(checkpoint, tmp_path / "lora")
    name = next(name for name in tensors if "v_proj.lora_A" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, weights)
    merged = merge(checkpoint, tmp_path / "lora")
    with pytest.raises(DamagedArtifactError, match="NaN"):
        merged.read("model.layers.0.self_attn.v_proj.weight")
