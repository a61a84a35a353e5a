"""Every selection by its name. A new one is a file beside these and a line here."""

from __future__ import annotations

from collections.abc import Callable

from spinecli.errors import OptionError
from spinecli.split.control.selection.baselines import PrioritySelection, RandomSelection
from spinecli.split.control.selection.candidates import Selection
from spinecli.split.control.selection.genetic import GeneticSelection
from spinecli.split.control.selection.greedy import GreedySelection

SELECTIONS: dict[str, Callable[[], Selection]] = {
    "greedy": GreedySelection,
    "genetic": GeneticSelection,
    "priority": PrioritySelection,
    "random": RandomSelection,
}


def selection_of(name: str) -> Selection:
    """The selection called `name`, as it is by default; OptionError with the list of known ones."""
    try:
        return SELECTIONS[name]()
    except KeyError:
        raise OptionError(f"The selection {name!r} is none of {', '.join(SELECTIONS)}; name one of these.") from None
