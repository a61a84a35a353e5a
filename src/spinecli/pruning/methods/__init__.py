"""The pruning methods, one file each; a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from spinecli.pruning.method import Method
from spinecli.pruning.methods.comp import Comp
from spinecli.pruning.methods.flap import Flap
from spinecli.pruning.methods.magnitude import Magnitude
from spinecli.pruning.methods.random import Random
from spinecli.pruning.methods.shortgpt import ShortGpt
from spinecli.pruning.methods.spine import Spine
from spinecli.pruning.methods.wanda_sp import WandaSp

METHODS: Mapping[str, Callable[[str, int], Method]] = MappingProxyType(
    {
        "spine": lambda metric, seed: Spine(),
        "comp": lambda metric, seed: Comp(metric),
        "magnitude": lambda metric, seed: Magnitude(),
        "random": lambda metric, seed: Random(seed),
        "wanda-sp": lambda metric, seed: WandaSp(),
        "flap": lambda metric, seed: Flap(),
        "shortgpt": lambda metric, seed: ShortGpt(),
    }
)
"""Name on the command line -> the method, from `--metric` and `--seed`."""
