"""Lengths in tokens that every model of an evaluation has room for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spinecli.errors import OptionError
from spinecli.evaluation.config import DEFAULT_PROMPT_LENGTH, GenerationConfig


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


def fit_generation(
    generation: GenerationConfig, positions: Mapping[str, int | None], note: Callable[[str], None]
) -> GenerationConfig:
    """The generation of language models with a prompt length that every model (label -> positions) has room for.

    Raises: OptionError if a length that was asked for does not fit.
    """
    if generation.new_tokens < 2:
        raise OptionError(f"--new-tokens must be at least 2, not {generation.new_tokens}.")
    length = generation.length
    for label, limit in positions.items():
        if limit is None or length + generation.new_tokens <= limit:
            continue
        room = limit - generation.new_tokens
        if generation.prompt_length is not None or room < 1:
            raise OptionError(
                f"A prompt of {length} and {generation.new_tokens} new tokens exceed the {limit} positions of "
                f"{label}; lower --prompt-length or --new-tokens."
            )
        note(f"The prompt has {room} tokens instead of {length}, because {label} has {limit} positions.")
        length = room
    return generation.model_copy(update={"prompt_length": length})


def fit_pass(
    generation: GenerationConfig, positions: Mapping[str, int | None], note: Callable[[str], None]
) -> GenerationConfig:
    """The same of classifiers, which run one pass over rows and generate nothing.

    Raises: OptionError if a length that was asked for does not fit.
    """
    asked = generation.prompt_length
    length = fit_row_length(asked, DEFAULT_PROMPT_LENGTH, positions, "--prompt-length", note)
    return generation.model_copy(update={"prompt_length": length, "new_tokens": 0})
