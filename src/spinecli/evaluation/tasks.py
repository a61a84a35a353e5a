"""lm-eval's tasks on a loaded model, with local data where a task file names it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinecli.artifacts.context import RunContext
from spinecli.errors import MeasurementError, OfflineError, OptionError, reason_of
from spinecli.evaluation.config import TaskConfig
from spinecli.evaluation.quiet import lm_eval_progress
from spinecli.evaluation.task_names import TaskNames, expand_names, lm_eval_names, own_folders, refuse_members

_DATA = ("dataset_path", "custom_dataset")
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks that exist and whose data has been found."""

    config: TaskConfig
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


def find_tasks(config: TaskConfig, context: RunContext | None = None) -> TaskSet:
    """Look the tasks up and load their data once, so that mistakes are found before any model is loaded.

    Raises: OptionError (unknown or unusable task), MissingPathError, OfflineError (data that has to be fetched).
    """
    from lm_eval.tasks import TaskManager

    names = expand_names(config)
    manager = TaskManager(include_path=[str(folder) for folder in own_folders(config)], include_defaults=False)
    index = manager.task_index
    _add_lm_evals_own(index, names)
    _refuse_unknown_members(index, names, config)
    if config.include_path:
        _resolve_local_data(index, names, config.include_path)
    with lm_eval_progress(context or RunContext()):
        for name in names:
            _check_task(manager, name)
    return TaskSet(config, names, manager)


def run_tasks(
    tasks: TaskSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: RunContext | None = None
) -> dict[str, JsonValue]:
    """Evaluate one model; lm-eval's result as it is, made JSON the way lm-eval does, without the single samples.

    lm-eval changes the padding of `tokenizer`, so give it one of its own.

    Raises: MeasurementError.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import handle_non_serializable

    config = tasks.config
    try:
        with lm_eval_progress(context or RunContext()):
            results = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size),
                tasks=list(tasks.names),
                num_fewshot=config.num_fewshot,
                batch_size=config.batch_size,
                device=str(model.device),
                limit=config.limit,
                log_samples=False,
                task_manager=tasks.manager,
                numpy_random_seed=config.seed,
                torch_random_seed=config.seed,
                fewshot_random_seed=config.seed,
            )
    # tasks are code of many authors; whatever they raise ends this measurement
    except Exception as error:
        raise MeasurementError(f"lm-eval stopped in {', '.join(tasks.names)}: {_reason(error)}.") from error
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


def _needed(index: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """These names and those that they stand for: the members of groups and the tasks that carry a tag, at any depth."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found and name in index:
            found[name] = None
            entry = index[name]
            # the tags of a task are those that it carries, those of a tag's entry the tasks that carry it
            waiting += sorted(entry.tags) if entry.cfg is None else _members(entry.cfg)
    return list(found)


def _refuse_unknown_members(index: Mapping[str, Any], names: Iterable[str], config: TaskConfig) -> None:
    """Tell which members of a group do not exist; lm-eval takes them for tasks without data and fails at those."""
    for name in names:
        if name not in index:
            continue
        for group, members in _unknown_members(index, name, index[name].cfg, False, frozenset()):
            file = index[group].yaml_path if group in index else index[name].yaml_path
            refuse_members(members, group, file, config)


def _unknown_members(
    index: Mapping[str, Any], group: str, configuration: Any, data: bool, outer: frozenset[str]
) -> Iterator[tuple[str, list[str]]]:
    """The groups, of this one and those inside, that list tasks which are neither known nor defined in the list.

    Args:
        data: whether a group around this one says what data its members have.
        outer: the groups around this one.
    """
    members = configuration.get("task") if isinstance(configuration, dict) and "group" in configuration else None
    if not isinstance(members, list) or group in outer:
        return
    data = data or any(key in configuration for key in _DATA)
    unknown = []
    for member in members:
        settings = member if isinstance(member, dict) else {"task": member}
        own = data or any(key in settings for key in _DATA)
        name = settings.get("group", settings.get("task"))
        if not isinstance(name, str):
            continue
        if name in index:
            yield from _unknown_members(index, name, index[name].cfg, own, outer | {group})
        elif "group" in settings:
            yield from _unknown_members(index, name, settings, own, outer | {group})
        elif not own:
            unknown.append(name)
    if unknown:
        yield group, unknown


def _check_task(manager: Any, name: str) -> None:
    """Load a task as lm-eval will, and turn what goes wrong into a user's sentence."""
    try:
        loaded = manager.load([name])
    except FileNotFoundError as error:
        raise OptionError(f"The data of task {name} was not found: {_reason(error)}; fix its data_files.") from error
    except ConnectionError as error:
        raise OfflineError(
            f"The data of task {name} is on the hub, which cannot be reached ({_reason(error)}); fetch it once with "
            "a connection, or name a task with local data."
        ) from error
    # a task file is configuration and code of any author, and lm-eval raises whatever comes of it
    except Exception as error:
        reason = _absent_data(manager.task_index, name, error) or _reason(error)
        raise OptionError(f"Task {name} cannot be loaded ({reason}); fix its file.") from error
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise OptionError(
                f"Task {task_name} runs code that the model writes, which spine does not do; leave it out."
            )
        if getattr(task, "MULTIMODAL", False):
            raise OptionError(f"Task {task_name} needs images or sound; spine measures text models, so leave it out.")


def _absent_data(index: Mapping[str, Any], name: str, error: Exception) -> str | None:
    """Which task names no data, or a split that its data lacks, if that is what went wrong."""
    for task in _needed(index, [name]):
        settings = index[task].cfg or {}
        if isinstance(error, KeyError):
            for key in _SPLITS:
                if key in settings and (settings[key],) == error.args:
                    return f"the data of {task} has no split {settings[key]!r}, which its {key} names"
        # what becomes of a path that is None
        elif isinstance(error, TypeError) and not {*_DATA, "class", "group"} & settings.keys() and settings:
            return f"{task} has no dataset_path"
    return None


def _reason(error: Exception) -> str:
    """The reason as part of a sentence, with what a reader needs where the message is empty or a single word."""
    if isinstance(error, KeyError) and len(error.args) == 1:
        key = error.args[0]
        # a KeyError puts its own sentence in quotes, as if it were a key
        return reason_of(ValueError(key)) if len(str(key).split()) > 3 else f"it finds no {key!r}"
    if type(error).__module__.startswith("datasets.") and isinstance(error.__cause__, Exception):
        # datasets says that it failed, and keeps why
        return _reason(error.__cause__)
    reason, kind = reason_of(error), type(error).__name__
    if " " in reason:
        return reason
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {frames[-1].filename} line {frames[-1].lineno}" if frames else ""
    return f"{kind}{place}" if reason == kind else f"{kind} {reason}{place}"


def _resolve_local_data(index: dict[str, Any], names: Iterable[str], folder: Path) -> None:
    """Let relative data files of the task files in `folder` mean files beside their task file.

    datasets would look for them from the current directory, so that a task only works when started from the right one.
    Names that do not exist beside the task file keep that meaning.

    Args:
        names: the tasks that are asked for; the files of others are left alone.
    """
    root = folder.expanduser().resolve()
    for name in _needed(index, names):
        file = index[name].yaml_path
        if file is None or root not in file.resolve().parents:
            continue
        try:
            index[name] = _with_local_data(index[name])
        # a file of any author, whose functions are imported here
        except Exception as error:
            raise OptionError(f"The task file {file} cannot be loaded ({_reason(error)}); fix it.") from error


def _with_local_data(entry: Any) -> Any:
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(entry.yaml_path)
    options = config.get("dataset_kwargs")
    if not isinstance(options, dict):
        return entry
    beside = {
        key: _beside(options[key], entry.yaml_path.resolve().parent)
        for key in ("data_files", "data_dir")
        if key in options
    }
    if beside == {key: options[key] for key in beside}:
        return entry
    # an entry without a file is built from its configuration
    return replace(entry, yaml_path=None, cfg={**config, "dataset_kwargs": {**options, **beside}})


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
