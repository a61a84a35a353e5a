"""Checkpoints that are plausible but odd: saved by transformers under unusual settings, or as releases have them.

Each is a recipe and what is done to the directory that `save_pretrained` wrote. It opens and computes what transformers
computes of the same directory, or it is refused in a sentence that names what is in the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import Recipe, classifier, recipe
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForTokenClassification, GPT2DoubleHeadsModel, LlamaForQuestionAnswering

Change = Callable[[Path], object]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Odd:
    """One odd checkpoint."""

    recipe: Recipe
    change: Change = lambda directory: None
    refused: tuple[str, ...] = ()
    """Words of the sentence that refuses it; none if it opens."""
    noted: tuple[str, ...] = ()
    """Words of the note that is given when it opens."""
    as_made: bool = False
    """transformers does not open the directory; the model that was saved says what is right."""


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the stored tensors."""

    def change(directory: Path) -> None:
        file = directory / "model.safetensors"
        found = load_file(file)
        edit(found)
        save_file({name: value.contiguous() for name, value in found.items()}, file, metadata={"format": "pt"})

    return change


def added(values: dict[str, Tensor]) -> Change:
    return tensors(lambda found: found.update(values))


def converted(dtype: torch.dtype, part: str = "") -> Change:
    """The tensors whose names hold `part`, stored in another dtype."""
    return tensors(lambda found: found.update({n: value.to(dtype) for n, value in found.items() if part in n}))


def moved(old: str, new: str) -> Change:
    return tensors(lambda found: found.update({new: found.pop(old)}))


def renamed(change: Callable[[str], str]) -> Change:
    return tensors(lambda found: [found.update({change(name): found.pop(name)}) for name in list(found)])


def settings(file: str = "config.json", **values: Any) -> Change:
    """Change the configuration; None takes a key out."""

    def change(directory: Path) -> None:
        path = directory / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        content = {key: value for key, value in {**content, **values}.items() if value is not None}
        path.write_text(json.dumps(content))

    return change


def both(*changes: Change) -> Change:
    return lambda directory: [change(directory) for change in changes]


def resaved(make: Callable[[Path], Any]) -> Change:
    """Saved again by another class of transformers."""

    def change(directory: Path) -> None:
        torch.manual_seed(0)
        make(directory).save_pretrained(directory)

    return change


def adapted(directory: Path) -> None:
    """An adapter in the place of the checkpoint that it was trained on."""
    model = get_peft_model(recipe("llama").model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "somebody/a-llama"
    (directory / "config.json").unlink()
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory)


def adapted_too(directory: Path) -> None:
    """An adapter beside the checkpoint that it was trained on."""
    kept = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    adapted(directory)
    for name, content in kept.items():
        (directory / name).write_bytes(content)


def in_another_shard_too(directory: Path) -> None:
    """Another value of a tensor in a later shard than the index says."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    other = directory / next(file for file in sorted(index.values(), reverse=True) if file != index[EMBEDDING])
    found = load_file(other)
    save_file({**found, EMBEDDING: torch.ones(320, 32)}, other, metadata={"format": "pt"})


def quantised(directory: Path) -> None:
    """Integers where GPTQ has them."""

    def pack(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if "proj" in name]:
            found.pop(name)
            found[name.replace("weight", "qweight")] = torch.ones(4, 4, dtype=torch.int32)

    tensors(pack)(directory)
    settings(quantization_config={"quant_method": "gptq", "bits": 4})(directory)


LLAMA, TIED = recipe("llama", grouped=True), recipe("llama", grouped=True, tied=True)
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD_BUFFERS = {
    "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
}
NEOX_BUFFERS = {
    "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
    "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
}

ODD: dict[str, Odd] = {
    # ties
    "said to be tied, stored apart": Odd(LLAMA, settings(tie_word_embeddings=True), noted=("values of its own", HEAD)),
    "tied and stored twice": Odd(TIED, tensors(lambda found: found.update({HEAD: found[EMBEDDING].clone()}))),
    "tied and stored twice, once in half precision": Odd(
        TIED, tensors(lambda found: found.update({HEAD: found[EMBEDDING].half()})), noted=("values of its own",)
    ),
    "tied, only the head stored": Odd(TIED, moved(EMBEDDING, HEAD)),
    "tied by the family's default": Odd(recipe("gemma", tied=True), settings(tie_word_embeddings=None)),
    "gpt-2 tied, only the head stored": Odd(recipe("gpt2", tied=True), moved("transformer.wte.weight", HEAD)),
    "opt said to be tied, stored apart": Odd(recipe("opt"), settings(tie_word_embeddings=True), noted=(HEAD,)),
    "untied without a head": Odd(TIED, settings(tie_word_embeddings=False), refused=(HEAD, "tie_word_embeddings")),
    "bert with a decoder bias of its own": Odd(
        recipe("bert", tied=True),
        tensors(lambda f: f.update({"cls.predictions.decoder.bias": f["cls.predictions.bias"] + 1})),
        noted=("cls.predictions.decoder.bias",),
    ),
    "bert said to be tied, stored apart": Odd(recipe("bert"), settings(tie_word_embeddings=True), noted=("own",)),
    # dtypes
    "float64": Odd(LLAMA, converted(torch.float64)),
    "norms in float32 beside bfloat16": Odd(recipe("llama", dtype="bfloat16"), converted(torch.float32, "norm")),
    "a head in float32 beside float16": Odd(recipe("llama", dtype="float16"), converted(torch.float32, "lm_head")),
    "eight-bit floats": Odd(
        LLAMA,
        both(settings(quantization_config={"quant_method": "fp8"}), converted(torch.float8_e4m3fn, "proj")),
        refused=("F8_E4M3", "quantised by fp8"),
    ),
    "integers": Odd(LLAMA, converted(torch.int8, "down_proj"), refused=("I8", "dequantise")),
    "packed integers": Odd(LLAMA, quantised, refused=("quantised by gptq",)),
    # settings that no longer hold
    "said to be in four bits": Odd(
        LLAMA,
        settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        noted=("quantised by bitsandbytes", "left out"),
        as_made=True,
    ),
    "said to be quantised, without a word how": Odd(
        LLAMA, settings(quantization_config={}), noted=("unnamed",), as_made=True
    ),
    "said to be compressed": Odd(
        recipe("qwen3", grouped=True),
        settings(quantization_config={"quant_method": "compressed-tensors", "format": "float-quantized"}),
        noted=("compressed-tensors",),
        as_made=True,
    ),
    "code of its own for a known family": Odd(
        recipe("phi3", grouped=True), settings(auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    ),
    "no architectures": Odd(LLAMA, settings(architectures=None)),
    "an architecture of a fork's name": Odd(LLAMA, settings(architectures=["LLaMAForCausalLM"])),
    # tensors that the model does not use
    "masks of old gpt-2": Odd(recipe("gpt2", tied=True), added(OLD_BUFFERS), noted=("attn.bias", "masked_bias")),
    "masks and rotary tables of old gpt-neox": Odd(recipe("gpt_neox"), added(NEOX_BUFFERS), noted=("inv_freq",)),
    "rotary tables in every block": Odd(
        LLAMA,
        added({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}),
        noted=("(3)", "inv_freq"),
    ),
    "a value head": Odd(LLAMA, added({"v_head.summary.weight": torch.ones(1, 32)}), noted=("v_head",)),
    "a block too many": Odd(LLAMA, settings(num_hidden_layers=2), noted=("model.layers.2.",)),
    "a bias that the configuration does not ask for": Odd(
        LLAMA, added({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), noted=("q_proj.bias",)
    ),
    "positions as integers": Odd(
        recipe("roberta"), added({"roberta.embeddings.position_ids": torch.arange(9)[None]}), noted=("position_ids",)
    ),
    "a bias that is asked for and not there": Odd(LLAMA, settings(attention_bias=True), refused=("q_proj.bias",)),
    "a block too few": Odd(LLAMA, settings(num_hidden_layers=4), refused=("model.layers.3.",)),
    # names
    "saved without its head": Odd(TIED, resaved(lambda d: TIED.model().model)),
    "saved without its head, untied": Odd(LLAMA, resaved(lambda d: LLAMA.model().model), refused=(HEAD,)),
    "names without the base model's prefix": Odd(
        recipe("gpt2", tied=True), renamed(lambda n: n[len("transformer.") :])
    ),
    # heads of other kinds
    "a tagger": Odd(
        TIED,
        resaved(lambda d: AutoModelForTokenClassification.from_pretrained(d, num_labels=3)),
        refused=("LlamaForTokenClassification", "LlamaForCausalLM"),
    ),
    "an answerer": Odd(
        LLAMA, resaved(lambda d: LlamaForQuestionAnswering.from_pretrained(d)), refused=("LlamaForQuestionAnswering",)
    ),
    "two heads": Odd(
        recipe("gpt2", tied=True),
        resaved(lambda d: GPT2DoubleHeadsModel.from_pretrained(d)),
        refused=("GPT2DoubleHeadsModel",),
    ),
    "a regression": Odd(classifier("llama", extra=(("num_labels", 1),))),
    "many labels at once": Odd(classifier("bert", extra=(("problem_type", "multi_label_classification"),))),
    # token ids
    "a padding beyond the embedding": Odd(LLAMA, settings(pad_token_id=320), refused=("pad_token_id 320", "320 rows")),
    "an end beyond the embedding": Odd(LLAMA, settings(eos_token_id=[2, 999]), refused=("eos_token_id 999",)),
    "a beginning beyond the embedding, for generation": Odd(
        LLAMA, settings("generation_config.json", bos_token_id=320), refused=("generation_config.json", "bos_token_id")
    ),
    "padding -1, as the first Llama has it": Odd(LLAMA, settings(pad_token_id=-1)),
    "no special tokens": Odd(LLAMA, settings(pad_token_id=None, bos_token_id=None, eos_token_id=None)),
    "an embedding of another size than said": Odd(LLAMA, settings(vocab_size=300), refused=(EMBEDDING, "[320, 32]")),
    # shapes and arithmetic
    "one head for all keys": Odd(Recipe("llama", kv_heads=1)),
    "heads wider than the model": Odd(recipe("qwen3", grouped=True, extra=(("head_dim", 20),))),
    "positions stretched as Llama 3 does": Odd(
        recipe("llama", grouped=True), settings(rope_parameters={**LLAMA3, "original_max_position_embeddings": 32})
    ),
    "positions stretched by YaRN": Odd(
        recipe("qwen2"), settings(rope_parameters={**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 32})
    ),
    "scores scaled by the block's number": Odd(
        recipe("gpt2", tied=True),
        settings(scale_attn_by_inverse_layer_idx=True),
        refused=("scale_attn_by_inverse_layer_idx True",),
    ),
    "another activation": Odd(recipe("llama", extra=(("hidden_act", "gelu_pytorch_tanh"),))),
    "a narrow embedding": Odd(recipe("opt", tied=True, extra=(("word_embed_proj_dim", 16),))),
    "a shard a tensor": Odd(recipe("llama", shard_size="1KB")),
    "a tensor in two shards": Odd(recipe("llama", shard_size="1KB"), in_another_shard_too),
    "answers without names": Odd(LLAMA, settings(return_dict=False)),
    "saved for TorchScript": Odd(LLAMA, settings(torchscript=True)),
    # not checkpoints
    "an adapter beside the weights": Odd(LLAMA, adapted_too, refused=("somebody/a-llama", "adapter_config.json")),
    "an adapter": Odd(LLAMA, adapted, refused=("adapter of somebody/a-llama", "--adapter")),
    "a multimodal wrapper": Odd(
        LLAMA, settings(model_type="llava", text_config={"model_type": "llama"}), refused=("wraps a llama",)
    ),
    "a model with code of its own": Odd(
        LLAMA, settings(model_type="own", auto_map={"AutoConfig": "configuration_own.Own"}), refused=("runs no code",)
    ),
    "a family that spine does not know": Odd(LLAMA, settings(model_type="mamba"), refused=("'mamba'", "llama")),
}
