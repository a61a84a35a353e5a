"""Runs of a comparison, one line each in a file, so that a stopped benchmark goes on where it was."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

_APART = ("strategies", "seeds", "target", "results", "table_only")

Run = dict[str, Any]


def collected(asked: Namespace, one_run: Callable[[str, int, Namespace], Run]) -> list[Run]:
    """All runs in the results file that have the settings asked for, after adding those that were missing."""
    done = [json.loads(line) for line in asked.results.read_text().splitlines()] if asked.results.exists() else []
    settings = {key: value for key, value in vars(asked).items() if key not in _APART}
    known = {(run["strategy"], run["seed"]) for run in done if run["settings"] == settings}
    for seed in map(int, asked.seeds.split(",")):
        for strategy in asked.strategies.split(","):
            if (strategy, seed) in known or asked.table_only:
                continue
            run = one_run(strategy, seed, asked) | {"settings": settings}
            done.append(run)
            with asked.results.open("a") as handle:
                handle.write(json.dumps(run) + "\n")
            print(
                f"{strategy} seed {seed}: accuracy {run['accuracy']:.3f}, {run['wall_seconds']:.0f} s here", flush=True
            )
    return [run for run in done if run["settings"] == settings]
