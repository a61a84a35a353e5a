"""The base of all records that are read from files and messages."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Unknown fields are refused, and nothing changes after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FiniteRecord(Record):
    """A record whose numbers are neither NaN nor infinite."""

    model_config = ConfigDict(allow_inf_nan=False)
