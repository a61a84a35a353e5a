"""How both halves go downhill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinecli.split.messages import Optimizer


def optimizer_of(kind: Optimizer, parameters: Sequence[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, or plain SGD without momentum (the authors' release of MergeSFL)."""
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
