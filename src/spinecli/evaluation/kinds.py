"""Which measures a kind of model has."""

from __future__ import annotations

from spinecli.errors import OptionError
from spinecli.evaluation.models import Subject
from spinecli.evaluation.settings import Settings


def require_measurable(subject: Subject, settings: Settings) -> None:
    """Refuse a measure that the model's kind does not have; all models of an evaluation are of one kind.

    Raises: OptionError.
    """
    for option, asked, of_classifiers in (
        ("--perplexity", settings.perplexity, False),
        ("--tasks", settings.tasks, False),
        ("--labelled", settings.labelled, True),
    ):
        if asked is None or subject.classifies == of_classifiers:
            continue
        if of_classifiers:
            raise OptionError(
                f"{option} measures classifiers and {subject.label} is a language model; use --perplexity or --tasks."
            )
        raise OptionError(
            f"{option} measures language models and {subject.label} is a classifier; use --labelled with examples."
        )
