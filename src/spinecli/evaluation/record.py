"""The base of every record of an evaluation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Unknown fields are refused, and nothing changes after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
