"""Ways to deal a training set out to devices, and how they are written on a command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from spinecli.errors import OptionError
from spinecli.federation.data.columns import DataOptions

_FORMS = "iid, dirichlet:ALPHA, shards:LABELS, column or column:NAME"


@dataclass(frozen=True)
class IID:
    """Every device draws from the same distribution, and all get equally much."""

    def __str__(self) -> str:
        return "iid"


@dataclass(frozen=True)
class Dirichlet:
    """Each label is spread over the devices in proportions drawn from a symmetric Dirichlet distribution."""

    alpha: float
    """Above 0; the smaller, the fewer devices hold most of a label."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise OptionError(f"--partition dirichlet:ALPHA needs a finite number above 0, not {self.alpha}.")

    def __str__(self) -> str:
        return f"dirichlet:{self.alpha!r}"


@dataclass(frozen=True)
class Shards:
    """The examples in order of their labels are cut into equal shards, of which each device gets equally many."""

    labels_per_device: int
    """Shards of a device, which is about the number of its labels."""

    def __post_init__(self) -> None:
        if self.labels_per_device < 1:
            raise OptionError(f"--partition shards:LABELS needs at least 1 label, not {self.labels_per_device}.")

    def __str__(self) -> str:
        return f"shards:{self.labels_per_device}"


@dataclass(frozen=True)
class ByColumn:
    """Examples of one group (a speaker, a user) stay together on one device."""

    column: str | None = None
    """None takes the column that is recognised by its name."""

    def __str__(self) -> str:
        return f"column:{self.column}" if self.column else "column"


Partition = IID | Dirichlet | Shards | ByColumn


def parse_partition(text: str) -> Partition:
    """The scheme that `iid`, `dirichlet:0.5`, `shards:2`, `column:speaker` or `column` names.

    `str` of a scheme is its inverse.

    Raises: OptionError.
    """
    name, colon, argument = text.strip().partition(":")
    argument = argument.strip()
    if name == "iid" and not colon:
        return IID()
    if name == "column" and bool(colon) == bool(argument):
        return ByColumn(argument or None)
    try:
        if name == "dirichlet":
            return Dirichlet(float(argument))
        if name == "shards":
            return Shards(int(argument))
    except ValueError as error:
        wanted = (
            "a number, for example dirichlet:0.5" if name == "dirichlet" else "a whole number, for example shards:2"
        )
        raise OptionError(f"--partition {text} needs {wanted}.") from error
    raise OptionError(f"--partition {text} is none of {_FORMS}.")


def options_for(scheme: Partition, options: DataOptions) -> DataOptions:
    """`options` with the group column that the scheme deals by, if it deals by groups."""
    if not isinstance(scheme, ByColumn):
        return options
    return replace(options, grouped=True, group_column=scheme.column or options.group_column)
