"""Which measures an evaluation takes: those that are named, or what suits the models where none is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spinecli.errors import OptionError
from spinecli.evaluation.config import EvaluateConfig, PerplexityConfig
from spinecli.evaluation.task_names import expand_names

if TYPE_CHECKING:
    from spinecli.evaluation.models import Subject


def check_measures(config: EvaluateConfig) -> None:
    """Find what can be wrong with the measures whatever the models are, without importing anything heavy for it.

    Raises: OptionError, MissingPathError.
    """
    if config.names_a_measure and not config.texts:
        _refuse_perplexity(config)
    if config.tasks:
        expand_names(config.tasks)


def require_measurable(subject: Subject, config: EvaluateConfig) -> None:
    """Refuse a measure that the model's kind does not have; all models of an evaluation are of one kind.

    Raises: OptionError.
    """
    for option, asked, of_classifiers in (
        ("--perplexity", config.perplexity, False),
        ("--tasks", config.tasks, False),
        ("--labelled", config.labelled, True),
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


def with_some_measure(config: EvaluateConfig, text: str | None) -> EvaluateConfig:
    """The config, with speed if it names no measure, and with perplexity on `text`, which is None of classifiers.

    Raises: OptionError if it says how to measure the perplexity of classifiers.
    """
    if text is None and not config.texts:
        _refuse_perplexity(config)
    if config.names_a_measure:
        return config
    perplexity = None
    if text is not None:
        perplexity = (config.perplexity or PerplexityConfig()).model_copy(update={"texts": (text,)})
    return config.model_copy(update={"latency": True, "perplexity": perplexity})


def _refuse_perplexity(config: EvaluateConfig) -> None:
    """Refuse options of perplexity, for which no text is named."""
    if config.perplexity is None:
        return
    for found in EvaluateConfig.fields():
        if found.path[0] == "perplexity" and config.value_of(found) != found.info.default:
            raise OptionError(f"{found.flag} belongs to --perplexity, which is not given; add it.")
    raise OptionError("--perplexity names no text; name one, or leave out all that belongs to it.")
