"""Several processes that train one student together, as `torchrun` or `accelerate launch` start them.

Each runs the whole command and takes its share of the rows, and the first of them writes. They must see the same disk.
What they exchange are sums of tensors, by accelerate's own means.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import PartialState

_Found = TypeVar("_Found")


def leads() -> bool:
    """Whether this process is the only one or the first, which speaks."""
    return os.environ.get("RANK", "0") == "0"


def own_device(device: str) -> str:
    """The device of this process where `cuda` means one for each."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@dataclass(frozen=True)
class Processes:
    """All of them, as one sees them."""

    number: int = 0
    """Of this one."""
    count: int = 1
    _state: PartialState | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the first, which writes."""
        return self.number == 0

    def share(self, items: Tensor) -> Tensor:
        """What is for this process of (items, ...)."""
        return items[self.number :: self.count]

    def total(self, values: Tensor) -> Tensor:
        """The sum of what all of them give, which has the same shape everywhere."""
        if self._state is None:
            return values
        from accelerate.utils import reduce

        summed: Tensor = reduce(values.to(self._state.device), "sum")
        return summed.to(values.device)

    def agreed(self, leading: bool) -> bool:
        """What the first of them says."""
        return bool(self.total(torch.tensor([int(leading and self.leads)])))

    def leader_first(self, task: Callable[[], _Found]) -> _Found:
        """Do it here, after the first of them has."""
        if not self.leads:
            self.wait()
        found = task()
        if self.leads:
            self.wait()
        return found

    def wait(self) -> None:
        """Until all of them have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()


@contextmanager
def together(device: str) -> Iterator[Processes]:
    """The processes that this one was started with; one that was started alone is all there are."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    try:
        yield Processes(state.process_index, state.num_processes, state)
    finally:
        state.destroy_process_group()
