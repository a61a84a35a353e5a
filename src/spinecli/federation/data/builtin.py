"""Labelled stories of the built-in language, there on every machine."""

from __future__ import annotations

from spinecli.data.tables import Table
from spinecli.errors import DataError

BUILTIN = "builtin:"
TOPICS = f"{BUILTIN}tiny-topics"
TOPICS_VALIDATION = f"{TOPICS}-validation"

# (examples, seed): made on demand, with seeds that neither the built-in model nor any other built-in text was made from
_STORIES = {TOPICS: (4000, 800_003), TOPICS_VALIDATION: (500, 800_004)}


def builtin_table(reference: str) -> Table:
    """Stories labelled with the topic of the place they begin at, which has to be told from what happens in them.

    Raises: DataError if there is no data set of that name.
    """
    from spinecli.demo import vocabulary
    from spinecli.demo.language import labelled

    if reference not in _STORIES:
        raise DataError(f"There is no data set {reference}; the built-in ones are {' and '.join(_STORIES)}.")
    rows = [{"text": story.text, "label": vocabulary.TOPICS[story.label]} for story in labelled(*_STORIES[reference])]
    return Table(reference, ("text", "label"), lambda: iter(enumerate(rows, start=1)), unit="row")
