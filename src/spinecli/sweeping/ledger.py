"""The figures found so far, one small file a model, so that a killed sweep measures nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from spinecli.sweeping.results import Refusal, Row

_EITHER: TypeAdapter[Row | Refusal] = TypeAdapter(Row | Refusal)


@dataclass(frozen=True)
class Ledger:
    """Files of figures by the models' names."""

    directory: Path

    def recorded(self, name: str, find: Callable[[], Row | Refusal]) -> Row | Refusal:
        """What is recorded under `name`; if nothing is, what `find` finds, which is recorded first."""
        path = self.directory / f"{name}.json"
        if path.is_file():
            return _EITHER.validate_json(path.read_bytes())
        found = find()
        self.directory.mkdir(exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(found.model_dump_json(), encoding="utf-8")
        temporary.rename(path)
        return found
