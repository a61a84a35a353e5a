"""What devices say of themselves and of their work, within bounds. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

CLASS_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$"
ClassName = Annotated[str, Field(pattern=CLASS_NAME)]
"""A class of devices. What is deployed for it lies in a directory of that name."""

MOST_EXAMPLES = 2**53
"""Counts up to here are exact as floats, which weights are."""
Examples = Annotated[int, Field(ge=1, le=MOST_EXAMPLES)]
"""How many a device has to train on."""

LARGEST = 1e15
"""No number in an answer may be larger: products of two, summed over any rank, still are numbers in float32."""
Loss = Annotated[float, Field(ge=0, le=LARGEST)]
"""In nats."""
Seconds = Annotated[float, Field(ge=0, le=1e9)]
"""Of work."""
