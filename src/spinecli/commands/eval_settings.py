"""From the options of `spine eval` to the settings of its measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spinecli.errors import OptionError

if TYPE_CHECKING:
    from spinecli.evaluation.settings import LabelledSettings, PerplexitySettings, TaskSettings


def require_measure(measure: str, asked: bool, given: Mapping[str, object]) -> None:
    """Refuse options of a measure that is not taken."""
    if asked:
        return
    for name, value in given.items():
        if value is not None:
            raise OptionError(f"--{name.replace('_', '-')} belongs to {measure}, which was not asked for; add it.")


def text_settings(texts: list[str] | None, given: Mapping[str, object]) -> PerplexitySettings | None:
    """How perplexity is taken; None if no text is named."""
    from spinecli.calibration.rows import SpecialTokens
    from spinecli.choice import choice
    from spinecli.evaluation.settings import PerplexitySettings

    if (special := given.get("special_tokens")) is not None:
        choice("--special-tokens", SpecialTokens, str(special))
    return PerplexitySettings.model_validate({"texts": texts, **_named(given)}) if texts else None


def task_settings(names: str | None, include_path: Path | None, given: Mapping[str, object]) -> TaskSettings | None:
    """What lm-eval runs; None if --tasks is not given."""
    from spinecli.evaluation.settings import TaskSettings

    if names is None:
        return None
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise OptionError("--tasks names no task; write names separated by commas.")
    return TaskSettings.model_validate({"names": wanted, "include_path": include_path, **_named(given)})


def labelled_settings(data: str | None, given: Mapping[str, object]) -> LabelledSettings | None:
    """Which examples classifiers answer; None if --labelled is not given."""
    from spinecli.evaluation.settings import LabelledSettings

    return None if data is None else LabelledSettings.model_validate({"data": data, **_named(given)})


def _named(given: Mapping[str, object]) -> dict[str, object]:
    """The options that were given; the settings know the defaults of the others."""
    return {name: value for name, value in given.items() if value is not None}
