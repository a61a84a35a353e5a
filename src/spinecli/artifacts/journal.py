"""State of a long pass, saved so that a killed run continues instead of starting over.

A pass over the blocks of a model has two kinds of state: what it found in each finished block, and the streams of
hidden states it carries from block to block. Both are written together, in one file, so that a kill cannot separate
them.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spinecli.artifacts.whole_file import whole_file


@dataclass(frozen=True)
class Checkpointed:
    """What was saved last: the number of finished blocks, their findings, and the streams after them."""

    finished: int
    tensors: dict[str, Tensor]


class PassJournal:
    """Saves the state of one pass after its first block, after its last, and in between as often as it is cheap.

    The moments of saving do not touch the results: a resumed pass starts from exact copies.

    Args:
        share: of the pass' time, how much saving may take; 1 saves after every block.
    """

    def __init__(self, directory: Path, name: str, share: float = 0.05) -> None:
        self._path = directory / f"{name}.safetensors"
        self._share = share
        self._began = time.monotonic()
        self._spent = 0.0

    def load(self) -> Checkpointed | None:
        """The newest saved state, or None if there is none or it was cut short."""
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="pt") as handle:
                finished = json.loads(handle.metadata()["journal"])["finished"]
                names = list(handle.keys())
                return Checkpointed(finished, {name: handle.get_tensor(name) for name in names})
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            return None

    def save(self, finished: int, tensors: dict[str, Tensor], *, last: bool = False) -> None:
        """Save if the savings so far took no more than their share of the time, or if this is the pass' last block."""
        start = time.monotonic()
        if not last and self._spent > self._share * (start - self._began):
            return
        # safetensors refuses tensors that share memory, which streams may do before the first removed block
        unique = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with whole_file(self._path) as part:
            save_file(unique, part, metadata={"journal": json.dumps({"finished": finished})})
        self._spent += time.monotonic() - start
