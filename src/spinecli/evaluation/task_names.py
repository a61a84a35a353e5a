"""The names of lm-eval's tasks, read off its files without importing it, so that a wrong one is told at once.

lm-eval parses the whole of its 14,000 task files before it knows a name. Here their top-level keys alone are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from os import walk
from pathlib import Path
from typing import NoReturn

import yaml

from spinecli.errors import MissingPathError, OptionError, reason_of
from spinecli.evaluation.config import TaskConfig

# a top-level key with what belongs to it: the rest of its line, and lines that are indented, items or comments
_KEY = re.compile(
    rb"^[\"']?(task|group|tag|include|class)[\"']?[ \t]*:((?:[^\n]*)(?:\n(?:[ \t#-][^\n]*|\r?))*)", re.MULTILINE
)
_PLAIN = re.compile(r"\s*([\"']?)([A-Za-z_][\w./+-]*)\1\s*")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}


@dataclass(frozen=True)
class TaskNames:
    """Where the tasks, groups and tags of some folders are defined."""

    files: dict[str, Path] = field(default_factory=dict)
    """By name of task or group."""
    tags: dict[str, list[Path]] = field(default_factory=dict)
    """The files of the tasks that carry a tag."""

    @property
    def all(self) -> set[str]:
        """Every name that can be asked for."""
        return {*self.files, *self.tags}

    def defining(self, name: str) -> Iterable[Path]:
        """The files of a task, of a group, or of the tasks that carry a tag; none if the name is unknown."""
        return [self.files[name]] if name in self.files else self.tags.get(name, [])


def expand_names(config: TaskConfig) -> tuple[str, ...]:
    """The tasks that are meant, each once, with patterns expanded.

    Raises: MissingPathError, OptionError if there is no such task.
    """
    if config.include_path is not None and not config.include_path.is_dir():
        raise MissingPathError(f"{config.include_path} is not a directory; name one that holds lm-eval task files.")
    places = [names_in(folder) for folder in own_folders(config)]
    known: set[str] = set().union(*(place.all for place in places))
    if not all(_matches(name, known) for name in config.names):
        known |= lm_eval_names().all
    names: list[str] = []
    for name in config.names:
        found = [match for match in _matches(name, known) if match not in names]
        if not found and name not in names:
            # lm-eval passes over files that it cannot read, and the task may be in one of those
            _refuse_broken(_yaml_files(config.include_path) if config.include_path else [])
            raise OptionError(f"There is no task {name!r}; {_advice([name], known)}")
        names += found
    if config.include_path:
        _refuse_broken([path for name in names for path in places[-1].defining(name)])
    return tuple(names)


def refuse_members(members: Sequence[str], group: str, file: Path | None, config: TaskConfig) -> NoReturn:
    """Tell that a group asks for tasks that do not exist.

    Args:
        file: of the group.

    Raises: OptionError, of the file that cannot be read if there is one, because the tasks may be in it.
    """
    _refuse_broken(_yaml_files(config.include_path) if config.include_path else [])
    known = lm_eval_names().all.union(*(names_in(folder).all for folder in own_folders(config)))
    listed = " and ".join(map(repr, members))
    place = f" in {file}" if file else ""
    absent = "which is no task" if len(members) == 1 else "which are no tasks"
    raise OptionError(f"The group {group}{place} asks for {listed}, {absent}; {_advice(members, known)}")


def own_folders(config: TaskConfig) -> list[Path]:
    """Folders of tasks beside lm-eval's own: that of the demo, and the user's."""
    demo = Path(str(resources.files("spinecli.demo") / "assets" / "tasks"))
    return [demo, *([config.include_path] if config.include_path else [])]


@lru_cache(maxsize=1)
def lm_eval_names() -> TaskNames:
    """The tasks that lm-eval brings; none if it is laid out in another way than is known here."""
    found = find_spec("lm_eval")
    places = (found.submodule_search_locations if found else None) or []
    folders = [folder for place in places if (folder := Path(place) / "tasks").is_dir()]
    return names_in(folders[0]) if folders else TaskNames()


def names_in(folder: Path) -> TaskNames:
    """The tasks of one folder. Of two files with one name the first counts, as in lm-eval."""
    names = TaskNames()
    seen: dict[Path, dict[str, object]] = {}
    for path in _yaml_files(folder):
        keys = _keys(path, seen)
        name = keys.get("group") if "group" in keys and "class" not in keys else keys.get("task")
        if not isinstance(name, str) or name in names.files:
            continue
        names.files[name] = path
        if "group" not in keys or "class" in keys:
            tags = keys.get("tag")
            for tag in tags if isinstance(tags, list) else [tags]:
                if isinstance(tag, str):
                    names.tags.setdefault(tag, []).append(path)
    return names


def _yaml_files(folder: Path) -> list[Path]:
    found = []
    for place, inner, files in walk(folder):
        inner[:] = [name for name in inner if name not in _IGNORED]
        found += [f"{place}/{name}" for name in files if name.endswith(".yaml")]
    return [Path(name) for name in sorted(found)]


def _keys(path: Path, seen: dict[Path, dict[str, object]]) -> dict[str, object]:
    """The keys of a file that name it, those of the files that it includes among them; its own count first."""
    if path in seen:
        return seen[path]
    seen[path] = {}
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    own = {match[1].decode(): _value(match[2].decode(errors="replace")) for match in _KEY.finditer(content)}
    included = own.pop("include", None)
    merged: dict[str, object] = {}
    for name in included if isinstance(included, list) else [included]:
        if isinstance(name, str):
            merged.update(_keys(path.parent / name, seen))
    seen[path] = {**merged, **own}
    return seen[path]


def _value(text: str) -> object:
    if plain := _PLAIN.fullmatch(text):
        return plain[2]
    try:
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError:
        return None


def _matches(name: str, known: set[str]) -> list[str]:
    if not any(sign in name for sign in "*?["):
        return [name] if name in known else []
    return sorted(one for one in known if fnmatchcase(one, name))


def _advice(unknown: Sequence[str], known: set[str]) -> str:
    """What to say to someone who asked for these names."""
    near = dict.fromkeys(name for one in unknown for name in _near(one, known))
    if near:
        return f"did you mean {' or '.join(near)}?"
    return "`lm-eval ls tasks` lists those that lm-eval brings, --include-path adds yours."


def _near(name: str, known: set[str]) -> list[str]:
    """Up to three names that `name` may have been meant for, in whatever case it is written."""
    lowered: dict[str, str] = {}
    for one in sorted(known):
        lowered.setdefault(one.lower(), one)
    alike = _matches(name.lower(), set(lowered)) or get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.6)
    return [lowered[one] for one in alike[:3]]


def _refuse_broken(paths: Sequence[Path]) -> None:
    """Tell what is wrong with the first of these files that lm-eval cannot read."""
    if not paths:
        return
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in paths:
        try:
            load_yaml(path, resolve_func=False)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            # the mistake may be in a file that this one includes
            file = mark.name if mark and Path(mark.name).is_file() else path
            line = f" line {mark.line + 1}" if mark else ""
            reason = ", ".join(part for part in (error.context, error.problem) if part)
            raise OptionError(f"The task file {file}{line} cannot be read ({reason}); fix it.") from error
        # a file of any author: it may include what is absent, or hold no mapping
        except Exception as error:
            reason = reason_of(error)
            raise OptionError(f"The task file {path} cannot be read ({reason}); fix it.") from error
