"""How long rows of tokens may be, so that every model under evaluation has room for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spinecli.errors import OptionError


def fit_row_length(
    asked: int | None,
    default: int,
    positions: Mapping[str, int | None],
    option: str,
    note: Callable[[str], None],
    rows: str = "Rows",
) -> int:
    """The length that was asked for; else the default, or as many tokens as every model has positions for.

    Args:
        positions: label -> positions of a model; None if it has no limit.
        option: the command-line option that asks for a length.
        rows: what the rows are called.

    Raises: OptionError if a model has no room for the length that was asked for.
    """
    length = default if asked is None else asked
    for label, limit in positions.items():
        if limit is None or length <= limit:
            continue
        if asked is not None:
            raise OptionError(f"{rows} of {length} tokens exceed the {limit} positions of {label}; lower {option}.")
        note(f"{rows} have at most {limit} tokens instead of {length}, because {label} has no more positions.")
        length = limit
    return length
