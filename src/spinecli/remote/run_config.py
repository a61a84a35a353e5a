"""What a run asks of every device, told once before the first job.

The config comes from the server. It names no path, no code and no data: a device opens its own checkpoint and its own
data, and refuses a config that was made for another checkpoint.
"""

from __future__ import annotations

import torch
from pydantic import Field

from spinecli.artifacts.record import FiniteRecord
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.config import Dtype
from spinecli.data.config import Task
from spinecli.federation.config import LoraConfig, SplitConfig
from spinecli.federation.request import FederatedRequest
from spinecli.federation.split.request import SplitRequest


class SplitCharter(FiniteRecord):
    """Where the model is cut, and what is trained of it."""

    cut: int = Field(ge=1)
    config: SplitConfig


class RunConfig(FiniteRecord):
    """What every device must do the same way."""

    checkpoint: str
    """Digest of the base checkpoint's files."""
    task: Task
    labels: tuple[str, ...]
    """Names of the labels in the order of their numbers; empty for language modelling."""
    lora: LoraConfig
    max_length: int = Field(ge=2)
    seed: int = Field(ge=0)
    dtype: Dtype
    split: SplitCharter | None = None

    def compute(self, device: str) -> ComputeOptions:
        """Where and in which precision to compute."""
        return ComputeOptions(device, getattr(torch, self.dtype))


def run_config_of(request: FederatedRequest) -> RunConfig:
    """What the devices of a run are told."""
    config, train = request.config, request.splits.train
    return RunConfig(
        checkpoint=request.source.digest,
        task=train.task,
        labels=tuple(train.labels) if train.task == "classification" else (),
        lora=config.lora,
        max_length=config.data.max_length,
        seed=config.seed,
        dtype=config.dtype,
        split=SplitCharter(cut=request.cut, config=config.split) if isinstance(request, SplitRequest) else None,
    )
