"""An option whose values have names."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from spinecli.errors import OptionError

_Choice = TypeVar("_Choice", bound=Enum)


def choice(option: str, kind: type[_Choice], name: str) -> _Choice:
    """The value of `kind` that `name` stands for; OptionError that names `option` and lists the known ones."""
    try:
        return kind(name)
    except ValueError:
        known = ", ".join(str(each.value) for each in kind)
        raise OptionError(f"{option} must be one of {known}, not {name!r}.") from None
