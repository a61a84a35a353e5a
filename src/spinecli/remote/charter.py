"""What a run asks of every device, told once before the first job.

The charter comes from the server. It names no path, no code and no data: a device opens its own checkpoint and its own
data, and refuses a charter that was made for another checkpoint.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from spinecli.calibration.stream import ComputeOptions
from spinecli.federation.data.columns import Task
from spinecli.federation.request import FederatedRequest
from spinecli.split.model import Way, Ways
from spinecli.split.request import SplitRequest

_Dtype = Literal["float32", "bfloat16", "float16"]


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SplitCharter(_Told):
    """Where the model is cut, and what is trained of it."""

    cut: int = Field(ge=1)
    bottom: Way
    top: Way
    rank: int = Field(ge=1)
    scale: float = Field(gt=0)
    targets: str
    optimizer: Literal["adamw", "sgd"]

    def ways(self) -> Ways:
        """What is trained of each half."""
        return Ways(self.bottom, self.top, self.rank, self.scale, self.targets)


class Charter(_Told):
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


def charter_of(request: FederatedRequest, split: SplitRequest | None = None) -> Charter:
    """The charter of a run."""
    options, train = request.options, request.splits.train
    return Charter(
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
    ways = request.options.ways
    return SplitCharter(
        cut=request.cut,
        bottom=ways.bottom,
        top=ways.top,
        rank=ways.rank,
        scale=ways.scale,
        targets=ways.targets,
        optimizer=request.options.optimizer,
    )
