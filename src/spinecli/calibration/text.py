"""Calibration and evaluation text: files, hub data sets, and text that is always there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from spinecli.errors import CalibrationTextError, MissingPathError, OfflineError

_BUILTIN = "builtin:"
_HUB_DATASET = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_FILE_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".md", ".csv", ".tsv", ".parquet")
_COLUMNS = ("text", "content", "sentence", "story", "document")


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    reference: str
    """As the user named it."""
    description: str
    """For a person: what this text is."""
    content: str


def load_text(reference: str, *, limit_characters: int | None = None) -> Text:
    """The text that `reference` names.

    A `.jsonl` file (one object with a text column a line), any other file as plain text, `builtin:python-docs`,
    `builtin:tiny-calibration`, `builtin:tiny-evaluation`, or a hub data set `owner/name` (its train split).

    Raises: MissingPathError, CalibrationTextError, OfflineError.
    """
    if reference.startswith(_BUILTIN):
        text = _builtin(reference)
    elif (path := Path(reference).expanduser()).is_file():
        text = Text(reference, path.name, _read_file(path))
    elif path.exists():
        raise CalibrationTextError(f"{path} is a directory; name a text or jsonl file.")
    elif not _HUB_DATASET.match(reference) or path.suffix in _FILE_SUFFIXES:
        raise MissingPathError(f"{path} does not exist; name a text or jsonl file, or a hub data set as owner/name.")
    else:
        text = _hub_dataset(reference, limit_characters or 4_000_000)
    if not text.content.strip():
        raise CalibrationTextError(f"{reference} holds no text; name another file.")
    return text


def default_text(builtin_model: bool) -> Text:
    """The calibration text when none is named: the built-in model's own language, else text that every Python has."""
    return load_text("builtin:tiny-calibration" if builtin_model else "builtin:python-docs")


def _builtin(reference: str) -> Text:
    name = reference.removeprefix(_BUILTIN)
    if name == "python-docs":
        from pydoc_data.topics import topics

        content = "\n\n".join(topics[key] for key in sorted(topics))
        return Text(reference, "Python's own reference manual (pydoc_data.topics)", content)
    for split in ("calibration", "evaluation"):
        if name == f"tiny-{split}":
            from spinecli.demo.texts import demo_text

            return Text(reference, f"stories, {split}", demo_text(split))
    raise CalibrationTextError(
        f"There is no text {reference}; the built-in texts are {_BUILTIN}python-docs, {_BUILTIN}tiny-calibration and "
        f"{_BUILTIN}tiny-evaluation."
    )


def _read_file(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationTextError(f"{path} is not UTF-8 text at byte {error.start}; convert it first.") from error
    except OSError as error:
        raise CalibrationTextError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    return _join_jsonl(path, content) if path.suffix in (".jsonl", ".ndjson") else content


def _join_jsonl(path: Path, content: str) -> str:
    pieces = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationTextError(f"{path} line {number} is not JSON; mend or remove the line.") from error
        column = next((name for name in _COLUMNS if isinstance(row, dict) and isinstance(row.get(name), str)), None)
        if column is None:
            raise CalibrationTextError(
                f"{path} line {number} has none of the text columns {', '.join(_COLUMNS)}; rename its column."
            )
        pieces.append(row[column])
    return "\n\n".join(pieces)


def _hub_dataset(reference: str, limit_characters: int) -> Text:
    import datasets

    try:
        rows = datasets.load_dataset(reference, split="train", streaming=True)
        pieces: list[str] = []
        size = 0
        for row in rows:
            column = next((name for name in _COLUMNS if isinstance(row.get(name), str)), None)
            if column is None:
                raise CalibrationTextError(f"{reference} has none of the text columns {', '.join(_COLUMNS)}.")
            pieces.append(row[column])
            size += len(pieces[-1])
            if size >= limit_characters:
                break
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise OfflineError(
            f"{reference} is no file here, and no data set of that name could be fetched from the hub; "
            "name a local text."
        ) from error
    return Text(reference, f"hub data set {reference}", "\n\n".join(pieces))
