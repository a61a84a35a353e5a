"""Tiny random checkpoints of every family, built and saved by transformers itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.skeleton import auto_class
from spinecli.checkpoints.stream.block_stream import answer

VOCABULARY = 320
HIDDEN = 32
POSITIONS = 128
LABELS = 3
ENCODERS = ("bert", "roberta", "narrow_bert", "narrow_roberta", "distilbert")
# Families whose heads all have keys and values of their own.
UNGROUPED = ("opt", "gpt2", "gpt_neox", *ENCODERS)
# Families some of whose blocks always see a window.
WINDOWED = ("gemma2", "gemma3_text", "ministral", "olmo3", "exaone4")
CHANNELS = {"distilbert": "hidden_dim", "gpt2": "n_inner"}
WORDS = [a + b for a in ("ba", "di", "ko", "lu", "me", "na", "po", "ri") for b in ("t", "s", "n", "l", "r", "k")]


@dataclass(frozen=True)
class Recipe:
    """One tiny checkpoint. Equal recipes give equal weights."""

    family: str = "llama"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    channels: int = 40
    blocks: int = 3
    tied: bool = False
    dtype: str = "float32"
    shard_size: str = "5GB"
    seed: int = 0
    task: str = "causal-lm"
    extra: tuple[tuple[str, Any], ...] = field(default=())

    def config(self) -> Any:
        common = {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "max_position_embeddings": POSITIONS,
            "tie_word_embeddings": self.tied,
            "initializer_range": 0.2,
            "init_std": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if self.task == "classification":
            common["num_labels"] = LABELS
        if self.family in UNGROUPED and self.family != "opt":
            own = {CHANNELS.get(self.family, "intermediate_size"): self.channels}
            if self.family.startswith("narrow"):
                own["attention_head_size"] = self.head_dim
        elif self.family == "opt":
            own = {"ffn_dim": self.channels, "word_embed_proj_dim": HIDDEN, "dropout": 0.0}
        else:
            own = {
                "intermediate_size": self.channels,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim,
            }
            if self.family != "llama":
                own["sliding_window"] = 6 if self.family in WINDOWED else None
        extra = {key: list(value) if isinstance(value, tuple) else value for key, value in self.extra}
        return AutoConfig.for_model(self.family, **{**common, **own, **extra})

    def model(self) -> PreTrainedModel:
        torch.manual_seed(self.seed)
        model = auto_class(Task(self.task)).from_config(self.config(), dtype=torch.float32)
        with torch.no_grad():
            # transformers starts biases at 0 and norms at 1, which would hide a bias or norm that goes astray
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model.to(getattr(torch, self.dtype)).eval()

    def write(self, directory: Path) -> Path:
        self.model().save_pretrained(directory, max_shard_size=self.shard_size)
        tokenizer().save_pretrained(directory)
        return directory


def recipe(family: str, *, grouped: bool = False, **changes: Any) -> Recipe:
    """A family's plain recipe, with grouped queries or one KV head per head."""
    if family in ENCODERS:
        changes = {"task": "masked-lm", **changes}
    return Recipe(family, kv_heads=2 if grouped else 4, **changes)


def classifier(family: str, **changes: Any) -> Recipe:
    """A family's recipe with a classifier's head."""
    return recipe(family, task="classification", **changes)


MIXED_WINDOWS = (("use_sliding_window", True), ("sliding_window", 6), ("max_window_layers", 1))
# The second block has no rotary positions, and if windows are on, they are its own.
NO_ROPE = (("no_rope_layer_interval", 2), ("use_sliding_window", True), ("sliding_window", 6))

# Windows in the first and third block, and scores scaled by a number that is not the head size.
GEMMA_WINDOWS = (
    ("layer_types", ("sliding_attention", "full_attention", "sliding_attention")),
    ("query_pre_attn_scalar", 20),
)

SECOND_WINDOWS = (("layer_types", ("full_attention", "sliding_attention", "full_attention")),)

# Everything that runs through a family's code on another path than the plain recipe does.
VARIANTS = {
    "llama": recipe("llama"),
    "llama grouped tied": recipe("llama", grouped=True, tied=True),
    "llama biases": recipe("llama", extra=(("attention_bias", True), ("mlp_bias", True))),
    "llama wide heads": recipe("llama", grouped=True, extra=(("head_dim", 12),)),
    "mistral": recipe("mistral", grouped=True),
    "mistral window": recipe("mistral", grouped=True, extra=(("sliding_window", 6),)),
    "qwen2": recipe("qwen2", grouped=True, tied=True),
    "qwen2 mixed windows": recipe("qwen2", grouped=True, extra=MIXED_WINDOWS),
    "qwen3": recipe("qwen3", grouped=True),
    "qwen3 mixed windows": recipe("qwen3", tied=True, extra=MIXED_WINDOWS),
    "gemma": recipe("gemma", tied=True),
    "gemma wide heads": recipe("gemma", grouped=True, extra=(("head_dim", 12),)),
    "gemma2": recipe("gemma2", grouped=True, tied=True, extra=GEMMA_WINDOWS),
    "gemma3_text": recipe("gemma3_text", grouped=True, extra=GEMMA_WINDOWS),
    "olmo2": recipe("olmo2", grouped=True, extra=(("attention_bias", True),)),
    "phi3": recipe("phi3", grouped=True, extra=(("sliding_window", 6), ("partial_rotary_factor", 0.75))),
    "phi3 tied": recipe("phi3", tied=True),
    "ministral": recipe("ministral", grouped=True, extra=SECOND_WINDOWS),
    "ministral3": recipe("ministral3", grouped=True, extra=(("rope_parameters", None),)),
    "seed_oss": recipe("seed_oss", grouped=True, extra=(("mlp_bias", True), ("attention_out_bias", True))),
    "hunyuan_v1_dense": recipe("hunyuan_v1_dense", grouped=True, tied=True),
    "arcee": recipe("arcee", grouped=True),
    "nemotron": recipe("nemotron", grouped=True),
    "starcoder2": recipe("starcoder2", grouped=True, tied=True),
    "ernie4_5": recipe("ernie4_5", grouped=True, tied=True),
    "olmo": recipe("olmo", extra=(("clip_qkv", 0.5),)),
    "olmo3": recipe("olmo3", grouped=True, extra=SECOND_WINDOWS),
    "exaone4": recipe("exaone4", grouped=True, extra=SECOND_WINDOWS),
    "glm": recipe("glm", grouped=True),
    "glm4": recipe("glm4", grouped=True),
    "smollm3": recipe("smollm3", grouped=True, tied=True, extra=NO_ROPE),
    "smollm3 biases": recipe("smollm3", extra=(("attention_bias", True), ("mlp_bias", True))),
    "gpt2": recipe("gpt2", tied=True),
    "gpt2 untied": recipe("gpt2"),
    "gpt_neox": recipe("gpt_neox"),
    "gpt_neox one after the other": recipe(
        "gpt_neox", tied=True, extra=(("use_parallel_residual", False), ("attention_bias", False))
    ),
    "opt": recipe("opt", tied=True),
    "opt untied": recipe("opt"),
    "gpt2 classifier": classifier("gpt2"),
    "llama classifier": classifier("llama", grouped=True),
    "opt classifier": classifier("opt"),
    "qwen2 classifier": classifier("qwen2", grouped=True, tied=True),
    "bert": classifier("bert"),
    "bert masked": recipe("bert", tied=True),
    "bert masked untied": recipe("bert"),
    "bert bare": recipe("bert", task="encoding"),
    "roberta": classifier("roberta"),
    "roberta masked": recipe("roberta", tied=True),
    "roberta bare": recipe("roberta", task="encoding"),
    "distilbert": classifier("distilbert"),
    "distilbert masked": recipe("distilbert", tied=True),
    "distilbert bare": recipe("distilbert", task="encoding"),
    "narrow bert": classifier("narrow_bert", heads=3),
    "narrow roberta bare": recipe("narrow_roberta", heads=3, task="encoding"),
    "opt post-norm": recipe("opt", tied=True, extra=(("do_layer_norm_before", False), ("word_embed_proj_dim", 16))),
}


@cache
def sample_text() -> str:
    chosen = random.Random(0)
    return " ".join(chosen.choices(WORDS, k=2500))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the made-up words."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [sample_text()], vocab_size=VOCABULARY, show_progress=False, special_tokens=["<pad>", "<s>", "</s>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def load(directory: Path) -> PreTrainedModel:
    """The whole model by transformers itself, which must find nothing missing or left over."""
    model, problems = auto_class(Checkpoint.open(directory).task).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def answers(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of a whole model, or the last hidden states of one without a head."""
    return answer(model(tokens, use_cache=False))
