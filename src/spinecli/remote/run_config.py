"""What a run asks of every device, told once before the first job.

The charter comes from the server. It names no path, no code and no data: a device opens its own checkpoint and its own
data, and refuses a charter that was made for another checkpoint.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from spinecli.artifacts.record import FiniteRecord
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.data.example_columns import Task
from spinecli.federation.request import FederatedRequest
from spinecli.federation.split.model import SplitTrainConfig, TrainMode
from spinecli.federation.split.request import SplitRequest

_Dtype = Literal["float32", "bfloat16", "float16"]


class SplitCharter(FiniteRecord):
    """Where the model is cut, and what is trained of it."""

    cut: int = Field(ge=1)
    bottom: TrainMode
    top: TrainMode
    rank: int = Field(ge=1)
    scale: float = Field(gt=0)
    targets: str
    optimizer: Literal["adamw", "sgd"]

    def modes(self) -> SplitTrainConfig:
        """What is trained of each half."""
        return SplitTrainConfig(self.bottom, self.top, self.rank, self.scale, self.targets)


class RunConfig(FiniteRecord):
    """What every device must do the same way."""

    checkpoint: str
    """Digest of the base checkpoint's files."""
    task: Task
    labels: tuple[str, ...]
    """Names of the labels in the order of their numbers; empty for language modelling."""
    targets: str
    max_length: int = Field(ge=2)
    seed: int = Field(ge=0)
    dtype: _Dtype
    split: SplitCharter | None = None

    def compute(self, device: str) -> ComputeOptions:
        """Where and in which precision to compute."""
        return ComputeOptions(device, getattr(torch, self.dtype))


def charter_of(request: FederatedRequest, split: SplitRequest | None = None) -> RunConfig:
    """The charter of a run."""
    options, train = request.options, request.splits.train
    return RunConfig(
        checkpoint=request.source.digest,
        task=train.task,
        labels=tuple(train.labels) if train.task == "classification" else (),
        targets=options.targets,
        max_length=options.max_length,
        seed=options.seed,
        dtype=_dtype_name(options.compute),
        split=None if split is None else _split_charter(split),
    )


def _dtype_name(compute: ComputeOptions) -> _Dtype:
    names: dict[torch.dtype, _Dtype] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return names[compute.dtype]


def _split_charter(request: SplitRequest) -> SplitCharter:
    modes = request.options.modes
    return SplitCharter(
        cut=request.cut,
        bottom=modes.bottom,
        top=modes.top,
        rank=modes.rank,
        scale=modes.scale,
        targets=modes.targets,
        optimizer=request.options.optimizer,
    )
