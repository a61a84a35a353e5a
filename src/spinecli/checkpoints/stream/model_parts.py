"""Parts of a transformers model as the block stream needs them.

Stand-ins take the blocks' place while the rest of the model runs, GPT-2's convolutions become linear layers, and
answers are read off whatever head there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spinecli.checkpoints.family import Family


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a model calls a block with, behind the hidden states: masks and positions, broadcast over the rows."""

    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)


class Recorder(nn.Module):
    """Stands in a block's place and keeps what the model would have called the block with."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.arguments = Arguments()

    def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        """Keep everything and change nothing."""
        self.hidden, self.arguments = hidden_states, Arguments(positional, named)
        return hidden_states


class Injector(nn.Module):
    """Stands in all blocks' place and hands on what the stream has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)

    def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        """The stream's hidden states, whatever comes in."""
        return self.hidden


def with_linears(blocks: Sequence[nn.Module], family: Family) -> Sequence[nn.Module]:
    """Put a Linear in the place of every transposed projection, so that every family's weights are (d_out, d_in)."""
    for block in blocks if family.transposed else ():
        for name in family.projections:
            d_in, d_out = block.get_parameter(f"{name}.weight").shape
            holder, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(holder), attribute, nn.Linear(d_in, d_out, device="meta").requires_grad_(False))
    return blocks


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
