"""BERT and RoBERTa with fewer attention heads of the size they had.

transformers takes the size of a head to be hidden_size / num_attention_heads, so that a model with fewer heads would
have larger ones. Here it is a key of the configuration, `attention_head_size`; all else is transformers' own. This file
lies beside the weights of such a checkpoint and needs nothing but torch and transformers.
"""

from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)


class NarrowBertConfig(BertConfig):  # type: ignore[misc]
    """A BertConfig that says how wide a head is."""

    model_type = "narrow_bert"
    attention_head_size: int = 64


class NarrowRobertaConfig(RobertaConfig):  # type: ignore[misc]
    """A RobertaConfig that says how wide a head is."""

    model_type = "narrow_roberta"
    attention_head_size: int = 64


class _Narrow:
    """Builds the stock model with as many heads as hidden_size holds, then makes its attention narrower."""

    def __init__(self, config, *arguments, **named):  # type: ignore[no-untyped-def]
        heads = config.num_attention_heads
        config.num_attention_heads = config.hidden_size // config.attention_head_size
        try:
            super().__init__(config, *arguments, **named)  # type: ignore[call-arg]
        finally:
            config.num_attention_heads = heads
        for layer in self.base_model.encoder.layer:  # type: ignore[attr-defined]
            attention, output = layer.attention.self, layer.attention.output
            width = heads * config.attention_head_size
            attention.num_attention_heads, attention.all_head_size = heads, width
            for name in ("query", "key", "value"):
                setattr(attention, name, nn.Linear(config.hidden_size, width))
            output.dense = nn.Linear(width, config.hidden_size)


class NarrowBertModel(_Narrow, BertModel):  # type: ignore[misc]
    """The encoder alone."""

    config_class = NarrowBertConfig


class NarrowBertForMaskedLM(_Narrow, BertForMaskedLM):  # type: ignore[misc]
    """With the masked-language-model head."""

    config_class = NarrowBertConfig


class NarrowBertForSequenceClassification(_Narrow, BertForSequenceClassification):  # type: ignore[misc]
    """With a classifier."""

    config_class = NarrowBertConfig


class NarrowRobertaModel(_Narrow, RobertaModel):  # type: ignore[misc]
    """The encoder alone."""

    config_class = NarrowRobertaConfig


class NarrowRobertaForMaskedLM(_Narrow, RobertaForMaskedLM):  # type: ignore[misc]
    """With the masked-language-model head."""

    config_class = NarrowRobertaConfig


class NarrowRobertaForSequenceClassification(_Narrow, RobertaForSequenceClassification):  # type: ignore[misc]
    """With a classifier."""

    config_class = NarrowRobertaConfig
