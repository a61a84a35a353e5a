"""What a whole model answers, whatever it was made for."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def answer(output: Any) -> Tensor:
    """The logits in a model's output, or the last hidden states of one without a head, in float32."""
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found.float()


def answering_by_last_token(model: PreTrainedModel) -> PreTrainedModel:
    """Let a causal classifier take the last token of every row, which must then come alone; others do not change.

    It would look for the last token that is no padding, but calibration rows are full, and a token of the text may well
    have the number of the padding.
    """
    if hasattr(model, "score"):
        model.config.pad_token_id = None
    return model
