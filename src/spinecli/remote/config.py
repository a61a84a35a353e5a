"""What `spine fed-device` is asked for, beside its connection."""

from __future__ import annotations

from typing import Annotated

from spinecli.config import Config, Device, Option
from spinecli.data.config import ColumnsConfig


class DeviceConfig(Config):
    """With which model and which examples a device takes part in a run."""

    model: Annotated[
        str,
        Option("Checkpoint to train, the same as the server's: a directory or a hub id.", argument=True, decides=False),
    ]
    data: Annotated[str, Option("Examples of this device; they do not leave it.", decides=False)]
    columns: ColumnsConfig = ColumnsConfig()
    device: Device = "cpu"
