"""One seed for a run, and from it a generator for every purpose, whatever was drawn before or elsewhere."""

from __future__ import annotations

import hashlib
import json
from random import Random

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed of 63 bits for one purpose, the same on every machine: sha256 over the run's seed and the purpose."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A torch generator on the CPU for one purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def random_generator(seed: int, *purpose: str | int) -> Random:
    """A generator of the standard library for one purpose."""
    return Random(derived_seed(seed, *purpose))
