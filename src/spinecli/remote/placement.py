"""What a SuperNode has on its disk, so that every process that it starts for a message finds it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from spinecli.remote.charter import Charter
from spinecli.remote.home import Home

SETTING = "placement"
"""Name of the SuperNode's own value that says which file it is in."""


class Placement(BaseModel):
    """What a device is, what the run asks of it, and how it shows who it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Home
    charter: Charter
    token: str
    """By which the server knows it."""
