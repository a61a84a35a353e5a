"""Modules that stand in the blocks' place while a model's other parts run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
