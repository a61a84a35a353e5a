"""lm-eval's tasks on a loaded model, with local data where a task file names it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinecli.errors import MeasurementError, OfflineError, OptionError, reason_of
from spinecli.evaluation.quiet import lm_eval_progress
from spinecli.evaluation.settings import TaskConfig
from spinecli.evaluation.task_names import TaskNames, expand_names, lm_eval_names, own_folders
from spinecli.progress import Progress, silent


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks that exist and whose data has been found."""

    settings: TaskConfig
    names: tuple[str, ...]
    """Patterns expanded."""
    manager: Any
    """lm-eval's TaskManager."""


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    deviation: float | None
    """Standard error."""
    higher_is_better: bool | None


def find_tasks(settings: TaskConfig, progress: Progress = silent, *, debug: bool = False) -> TaskSet:
    """Look the tasks up and load their data once, so that mistakes are found before any model is loaded.

    Raises: OptionError (unknown or unusable task), MissingPathError, OfflineError (data that has to be fetched).
    """
    from lm_eval.tasks import TaskManager

    names = expand_names(settings)
    manager = TaskManager(include_path=[str(folder) for folder in own_folders(settings)], include_defaults=False)
    _add_lm_evals_own(manager.task_index, names)
    if settings.include_path:
        _resolve_local_data(manager.task_index, settings.include_path)
    with lm_eval_progress(progress, debug):
        for name in names:
            _check_task(manager, name)
    return TaskSet(settings, names, manager)


def run_tasks(
    tasks: TaskSet,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = silent,
    *,
    debug: bool = False,
) -> dict[str, JsonValue]:
    """Evaluate one model; lm-eval's result as it is, made JSON the way lm-eval does, without the single samples.

    lm-eval changes the padding of `tokenizer`, so give it one of its own.

    Raises: MeasurementError.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import handle_non_serializable

    settings = tasks.settings
    try:
        with lm_eval_progress(progress, debug):
            results = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
                tasks=list(tasks.names),
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
                device=str(model.device),
                limit=settings.limit,
                log_samples=False,
                task_manager=tasks.manager,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
    # tasks are code of many authors; whatever they raise ends this measurement
    except Exception as error:
        raise MeasurementError(f"lm-eval stopped in {', '.join(tasks.names)}: {reason_of(error)}.") from error
    # NaN and infinity are no JSON; they become strings
    text = json.dumps(results, default=handle_non_serializable)
    found: dict[str, JsonValue] = json.loads(text, parse_constant=str)
    return found


def task_figures(results: Mapping[str, Any]) -> list[TaskFigure]:
    """The numbers in lm-eval's result: groups first, then tasks, one entry a metric and filter."""
    figures = []
    directions = results.get("higher_is_better", {})
    for task, metrics in {**results.get("groups", {}), **results["results"]}.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            deviation = metrics.get(f"{metric}_stderr,{chosen}")
            figures.append(
                TaskFigure(
                    task=task,
                    metric=metric if chosen == "none" else f"{metric} ({chosen})",
                    value=float(value),
                    deviation=float(deviation) if isinstance(deviation, int | float) else None,
                    higher_is_better=directions.get(task, {}).get(metric),
                )
            )
    return figures


def _add_lm_evals_own(index: dict[str, Any], names: Iterable[str]) -> None:
    """Add those of lm-eval's own tasks that these names need; reading all 14,000 would take many seconds.

    Args:
        index: lm-eval's entries by name, with those of other folders, which come first.
    """
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    wanted = [name for name in names if name not in index]
    wanted += [name for entry in index.values() for name in _members(entry.cfg) if name not in index]
    own = lm_eval_names() if wanted else TaskNames()
    configurations: dict[Path, dict[str, Any]] = {}
    while wanted:
        for path in own.defining(wanted.pop()):
            if path not in configurations:
                configurations[path] = load_yaml(path, resolve_func=False)
                wanted += _members(configurations[path])
    found: dict[str, Any] = {}
    # in lm-eval's order, because of two tasks of one name the first counts
    for path in sorted(configurations, key=Path.as_posix):
        TaskIndex.process_cfg(configurations[path], path, found)
    for name, entry in found.items():
        index.setdefault(name, entry)


def _members(configuration: Any) -> list[str]:
    """The names that a group's list of tasks holds, at any depth."""
    found: list[str] = []
    waiting = [configuration]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            inner = value.get("task")
            waiting += inner if isinstance(inner, list) else []
            found += [name for name in (inner, value.get("group")) if isinstance(name, str)]
        elif isinstance(value, str):
            found.append(value)
    return found


def _check_task(manager: Any, name: str) -> None:
    """Load a task as lm-eval will, and turn what goes wrong into a user's sentence."""
    try:
        loaded = manager.load([name])
    except FileNotFoundError as error:
        raise OptionError(f"The data of task {name} was not found: {reason_of(error)}; mend its data_files.") from error
    except ConnectionError as error:
        raise OfflineError(
            f"The data of task {name} is on the hub, which cannot be reached ({reason_of(error)}); fetch it once with "
            "a connection, or name a task with local data."
        ) from error
    # a task file is configuration and code of any author, and lm-eval raises whatever comes of it
    except Exception as error:
        raise OptionError(f"Task {name} cannot be loaded ({reason_of(error)}); mend its file.") from error
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise OptionError(
                f"Task {task_name} runs code that the model writes, which spine does not do; leave it out."
            )
        if getattr(task, "MULTIMODAL", False):
            raise OptionError(f"Task {task_name} needs images or sound; spine measures text models, so leave it out.")


def _resolve_local_data(index: dict[str, Any], folder: Path) -> None:
    """Let relative data files of the task files in `folder` mean files beside their task file.

    datasets would look for them from the current directory, so that a task only works when started from the right one.
    Names that do not exist beside the task file keep that meaning.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    root = folder.expanduser().resolve()
    for name, entry in index.items():
        if entry.yaml_path is None or root not in entry.yaml_path.resolve().parents:
            continue
        config = load_yaml(entry.yaml_path)
        options = config.get("dataset_kwargs")
        if not isinstance(options, dict):
            continue
        beside = {
            key: _beside(options[key], entry.yaml_path.resolve().parent)
            for key in ("data_files", "data_dir")
            if key in options
        }
        if beside != {key: options[key] for key in beside}:
            # an entry without a file is built from its configuration
            index[name] = replace(entry, yaml_path=None, cfg={**config, "dataset_kwargs": {**options, **beside}})


def _beside(value: Any, directory: Path) -> Any:
    """Relative names (alone, in a list, or by split) made absolute where `directory` has such a file."""
    if isinstance(value, dict):
        return {key: _beside(inner, directory) for key, inner in value.items()}
    if isinstance(value, list):
        return [_beside(inner, directory) for inner in value]
    if not isinstance(value, str) or "://" in value or Path(value).is_absolute():
        return value
    found = (directory / value).exists() or any(directory.glob(value))
    return str(directory / value) if found else value
