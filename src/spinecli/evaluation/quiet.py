"""Third-party libraries kept from writing to the terminal, in one place.

transformers and datasets have switches for their bars. lm-eval has none: its bars are `tqdm` objects that its modules
make, so for the time of an evaluation the name points to a class that reports to spine's own progress callback.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from spinecli.artifacts.context import Progress, RunContext, silent

_NOISY = ("lm_eval", "datasets", "huggingface_hub", "evaluate", "peft", "torch", "accelerate")
_MODULES_WITH_BARS = ("lm_eval.models.huggingface", "lm_eval.api.task", "lm_eval.api.model")


@contextmanager
def quiet_libraries(debug: bool = False) -> Iterator[None]:
    """No bars, warnings or log lines of transformers, datasets and lm-eval inside; with `debug`, all of them.

    What third-party code prints goes to stderr either way: stdout belongs to the result.
    """
    with redirect_stdout(sys.stderr):
        if debug:
            yield
        else:
            with _silenced():
                yield


@contextmanager
def _silenced() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def lm_eval_progress(context: RunContext) -> Iterator[None]:
    """lm-eval's and datasets' bars, reported as progress instead of drawn; with `debug`, drawn."""
    if context.debug:
        yield
        return
    import datasets
    import lm_eval.evaluator
    from lm_eval.loggers.utils import get_commit_from_path

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    modules = [sys.modules[name] for name in _MODULES_WITH_BARS if hasattr(sys.modules.get(name), "tqdm")]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "tqdm", _bar_reporting_to(context.progress)))
        # it asks `git`, which complains on the terminal wherever there is no repository
        quiet_hash = partial(get_commit_from_path, Path.cwd())
        stack.enter_context(patch.object(lm_eval.evaluator, "get_git_commit_hash", quiet_hash))
        if bars:
            stack.callback(datasets.enable_progress_bars)
        yield


class _Bar:
    """The part of tqdm that lm-eval uses."""

    report: Progress = staticmethod(silent)

    def __init__(
        self, iterable: Iterable[Any] | None = None, desc: str | None = None, total: int | None = None, **_: Any
    ) -> None:
        self._iterable = iterable if iterable is not None else ()
        self._total = total if total is not None else len(iterable) if isinstance(iterable, Sized) else 0
        self._name = (desc or "preparing requests").lower()
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self._done += count
        type(self).report(self._name, self._done, max(self._total, self._done))

    def close(self) -> None:
        """Nothing is held."""


def _bar_reporting_to(progress: Progress) -> type[_Bar]:
    return type("Bar", (_Bar,), {"report": staticmethod(progress)})
