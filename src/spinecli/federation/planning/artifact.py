"""A LoRA plan on disk: `plan.safetensors`, with the devices' names in `spine.json`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spinecli.artifacts.manifest import MANIFEST_NAME, Manifest, expect_kind, record_file
from spinecli.errors import DamagedArtifactError, ForeignArtifactError
from spinecli.federation.simulation.fleet import Fleet
from spinecli.lora.planning.capacity import Capacities, Capacity
from spinecli.lora.planning.configuration import Goals
from spinecli.lora.planning.ranks import ranks_by_device

PLAN_NAME = "plan.safetensors"
PLAN_KIND: Final = "lora-plan"


@dataclass(frozen=True, eq=False)
class PlanTensors:
    """The content of `plan.safetensors`, row i for device i of the fleet; 0 throughout for an excluded device."""

    rank_distribution: Tensor
    """(blocks,) int64: the rank of each block wherever it is trained."""
    ranks: Tensor
    """(devices, blocks) int64, 0 where a device has no LoRA."""
    depths: Tensor
    """(devices,) int64."""
    compute_seconds: Tensor
    """(devices,) float64, predicted for a round."""
    up_seconds: Tensor
    """(devices,) float64."""
    down_seconds: Tensor
    """(devices,) float64."""
    round_seconds: Tensor
    """(devices,) float64: down, compute and up."""
    up_bytes: Tensor
    """(devices,) int64."""
    down_bytes: Tensor
    """(devices,) int64."""
    memory_bytes: Tensor
    """(devices,) int64: peak while training."""
    capacities: Tensor
    """(devices, 5) float64, columns as in `lora.planning.capacity.Capacity`; also of excluded devices."""

    def save(self, directory: Path) -> None:
        """Write `plan.safetensors`."""
        # safetensors refuses tensors that share memory, as up and down bytes do
        tensors = {field.name: getattr(self, field.name).contiguous().clone() for field in fields(self)}
        save_file(tensors, directory / PLAN_NAME)

    def problem(self) -> str | None:
        """What contradicts itself, or None."""
        if self.ranks.ndim != 2 or not self.ranks.numel():
            return f"ranks has the shape {list(self.ranks.shape)}"
        devices, blocks = self.ranks.shape
        shapes = {
            "rank_distribution": (blocks,),
            "ranks": (devices, blocks),
            "capacities": (devices, len(fields(Capacity))),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if value.shape != shapes.get(field.name, (devices,)):
                return f"{field.name} has the shape {list(value.shape)}"
            if value.is_floating_point() and not bool((value.isfinite() & (value >= 0)).all()):
                return f"{field.name} has a value below 0 or not finite"
        if not bool(((self.depths >= 0) & (self.depths <= blocks)).all()) or int(self.rank_distribution.min()) < 1:
            return "a depth or a rank is out of range"
        if not torch.equal(self.ranks, ranks_by_device(self.rank_distribution, self.depths)):
            return "ranks and depths contradict each other"
        return None


@dataclass(frozen=True, eq=False)
class LoraPlan:
    """A validated plan with what it belongs to."""

    manifest: Manifest
    devices: tuple[str, ...]
    """Names, in the order of the rows."""
    tensors: PlanTensors

    @property
    def blocks(self) -> int:
        """Blocks of the checkpoint it was made for."""
        return len(self.tensors.rank_distribution)

    def capacities(self) -> Capacities:
        """Where capacity estimates start from."""
        return Capacities(*self.tensors.capacities.unbind(dim=1))

    def ranks_of(self, device: str) -> tuple[int, ...]:
        """Rank of every block on one device, 0 where it has no LoRA; KeyError for a device of another fleet."""
        if device not in self.devices:
            raise KeyError(device)
        return tuple(self.tensors.ranks[self.devices.index(device)].tolist())

    def goals(self) -> Goals:
        """What the plan had to keep."""
        asked = self.manifest.parameters
        budget = asked["traffic_budget"]
        return Goals(
            max_waiting=float(str(asked["max_waiting"])),
            coverage=float(str(asked["coverage"])),
            min_depth=int(str(asked["min_depth"])),
            traffic_budget=None if budget is None else float(str(budget)) * 1e6,
        )

    def require(self, fleet: Fleet, blocks: int) -> None:
        """Raise ForeignArtifactError unless the plan was made for this fleet's devices and so many blocks."""
        if self.blocks != blocks:
            raise ForeignArtifactError(
                f"The plan is for a checkpoint of {self.blocks} blocks, not {blocks}; run spine plan on this one."
            )
        if self.devices != tuple(device.name for device in fleet.devices):
            raise ForeignArtifactError(
                f"The plan is for the fleet {self.manifest.inputs['fleet'].reference}, whose devices are not those of "
                f"{fleet.reference}; name that fleet or run spine plan on this one."
            )


def read_plan(directory: Path) -> LoraPlan:
    """Read and validate a plan that `spine plan` wrote.

    Raises: MissingPathError, ForeignArtifactError (no plan), DamagedArtifactError.
    """
    manifest = expect_kind(directory, (PLAN_KIND,), "name a directory that spine plan wrote")
    path = directory / PLAN_NAME
    if not path.is_file() or manifest.outputs.get(PLAN_NAME) != record_file(path):
        raise DamagedArtifactError(f"{path} is not the file that {MANIFEST_NAME} lists; run spine plan again.")
    try:
        tensors = PlanTensors(**load_file(path))
        problem = tensors.problem()
    except (SafetensorError, TypeError, KeyError) as error:
        raise DamagedArtifactError(f"{path} is damaged; run spine plan again.") from error
    names = _device_names(manifest)
    if len(names) != len(tensors.depths) or "fleet" not in manifest.inputs:
        problem = f"{MANIFEST_NAME} names other devices"
    if problem:
        raise DamagedArtifactError(f"{path} is damaged: {problem}; run spine plan again.")
    return LoraPlan(manifest, names, tensors)


def _device_names(manifest: Manifest) -> tuple[str, ...]:
    devices = manifest.report.get("devices")
    if not isinstance(devices, list):
        return ()
    return tuple(str(device["name"]) for device in devices if isinstance(device, dict) and "name" in device)
