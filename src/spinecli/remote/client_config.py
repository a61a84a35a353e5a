"""What a device is told by its own machine: checkpoint, data, memory. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

from spinecli.artifacts.record import Record
from spinecli.data.config import ColumnsConfig
from spinecli.federation.bounds import ClassName


class ClientConfig(Record):
    """A device as its own machine describes it."""

    device: str
    """Its name."""
    model: str
    """Checkpoint, as a user types it."""
    part: Path | None = None
    """Its encoded examples, if somebody has encoded them."""
    data: str | None = None
    """Its examples otherwise, as a user types them."""
    columns: ColumnsConfig = ColumnsConfig()
    memory: Path
    """Directory for what it remembers from round to round."""
    device_class: ClassName
    memory_bytes: int
    threads: int | None = None
    """That training may use; None: as torch has it."""
    compute_device: str = "cpu"
