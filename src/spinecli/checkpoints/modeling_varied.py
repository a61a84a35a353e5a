"""Causal language models whose blocks differ in width: each has heads and channels of its own, or lacks a sub-layer.

transformers' configurations can say so (`per_layer_config`), its models cannot yet. Here every block is transformers'
own, built from its own configuration. In `per_layer_config`, "skip" names what a block lacks: "attention" or "mlp".
A Llama is written as a Mistral, whose modules compute the same and whose configuration asks less of head counts.
This file lies beside the weights of such a checkpoint and needs nothing but torch and transformers.
"""

from torch import nn, zeros_like
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class WithoutHeads(nn.Module):
    """Adds nothing to the residual stream and keeps nothing in the cache."""

    def forward(self, hidden_states, **_):  # type: ignore[no-untyped-def]
        """Zeros, and no attention weights."""
        return zeros_like(hidden_states), None


class WithoutChannels(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states):  # type: ignore[no-untyped-def]
        """Zeros."""
        return zeros_like(hidden_states)


class _Varied:
    """Builds the stock model without blocks, then each block from its own configuration."""

    def __init__(self, config, *arguments, **named):  # type: ignore[no-untyped-def]
        blocks = config.num_hidden_layers
        config.num_hidden_layers = 0
        try:
            super().__init__(config, *arguments, **named)  # type: ignore[call-arg]
        finally:
            config.num_hidden_layers = blocks
        layers = nn.ModuleList()
        for index, block_config in enumerate(config.per_layer_config):
            layer = self.block_class(block_config, index)  # type: ignore[attr-defined]
            skipped = getattr(block_config, "skip", [])
            if "attention" in skipped:
                layer.input_layernorm, layer.self_attn = nn.Identity(), WithoutHeads()
            if "mlp" in skipped:
                layer.post_attention_layernorm, layer.mlp = nn.Identity(), WithoutChannels()
            layers.append(layer)
        self.base_model.layers = layers  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]

    def set_attn_implementation(self, *arguments, **named):  # type: ignore[no-untyped-def]
        """As transformers has it, and for the blocks' own configurations, too."""
        super().set_attn_implementation(*arguments, **named)  # type: ignore[misc]
        for module in self.base_model.layers.modules():  # type: ignore[attr-defined]
            if hasattr(module, "config"):
                module.config._attn_implementation = self.config._attn_implementation  # type: ignore[attr-defined]


class VariedMistralConfig(MistralConfig):  # type: ignore[misc]
    """A MistralConfig whose `per_layer_config` counts."""

    model_type = "varied_mistral"


class VariedMistralModel(_Varied, MistralModel):  # type: ignore[misc]
    """Without a head."""

    config_class, block_class = VariedMistralConfig, MistralDecoderLayer


class VariedMistralForCausalLM(_Varied, MistralForCausalLM):  # type: ignore[misc]
    """With the language model's head."""

    config_class, block_class = VariedMistralConfig, MistralDecoderLayer


class VariedMistralForSequenceClassification(_Varied, MistralForSequenceClassification):  # type: ignore[misc]
    """With a classifier."""

    config_class, block_class = VariedMistralConfig, MistralDecoderLayer


class VariedQwen2Config(Qwen2Config):  # type: ignore[misc]
    """A Qwen2Config whose `per_layer_config` counts."""

    model_type = "varied_qwen2"


class VariedQwen2Model(_Varied, Qwen2Model):  # type: ignore[misc]
    """Without a head."""

    config_class, block_class = VariedQwen2Config, Qwen2DecoderLayer


class VariedQwen2ForCausalLM(_Varied, Qwen2ForCausalLM):  # type: ignore[misc]
    """With the language model's head."""

    config_class, block_class = VariedQwen2Config, Qwen2DecoderLayer


class VariedQwen2ForSequenceClassification(_Varied, Qwen2ForSequenceClassification):  # type: ignore[misc]
    """With a classifier."""

    config_class, block_class = VariedQwen2Config, Qwen2DecoderLayer


class VariedQwen3Config(Qwen3Config):  # type: ignore[misc]
    """A Qwen3Config whose `per_layer_config` counts."""

    model_type = "varied_qwen3"


class VariedQwen3Model(_Varied, Qwen3Model):  # type: ignore[misc]
    """Without a head."""

    config_class, block_class = VariedQwen3Config, Qwen3DecoderLayer


class VariedQwen3ForCausalLM(_Varied, Qwen3ForCausalLM):  # type: ignore[misc]
    """With the language model's head."""

    config_class, block_class = VariedQwen3Config, Qwen3DecoderLayer


class VariedQwen3ForSequenceClassification(_Varied, Qwen3ForSequenceClassification):  # type: ignore[misc]
    """With a classifier."""

    config_class, block_class = VariedQwen3Config, Qwen3DecoderLayer
