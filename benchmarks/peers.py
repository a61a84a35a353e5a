"""The default method beside its peers: perplexity on two kinds of text, over three draws of calibration rows.

    python benchmarks/peers.py --results peers.jsonl [--models english-7M stories260K tiny] [--table-only]

Every method sees the same 128 x 128 tokens of calibration text; each of the three draws of them starts elsewhere in the
text. Evaluation: the first 40 x 256 tokens (40 x 128 of the built-in model) of a held-out text of the same kind, and of
one of another kind where the model's tokenizer can write one. `spine` re-fits as it cuts; the others are shown as cut,
and after `spine tune --method mask`, which is COMP's own recovery, and `--method auto` where asked for.

Each run is a line in the results file; runs that are there already are not repeated. Checkpoints other than the
built-in one are read from ../shared and skipped where they are absent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality import perplexity
from settings import SHARED, Setting, settings

from spinecli.artifacts.directory import OutputOptions
from spinecli.data.config import CalibrationConfig
from spinecli.data.text import load_text
from spinecli.pruning.config import PruneConfig, TuneConfig, TuneMethod, Widths
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.recovery.tune import tune
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

OTHER = {
    "english-7M": SHARED / "datasets" / "wikitext2" / "test.txt",
    "stories260K": SHARED / "texts" / "english-evaluation.txt",
}


@dataclass(frozen=True)
class Recipe:
    """One way to prune, and what is done to the cut afterwards."""

    method: str
    widths: Widths | None = None
    tunings: tuple[str, ...] = ()


RECIPES = {
    "spine": Recipe("spine"),
    "spine, adaptive": Recipe("spine", Widths.adaptive),
    "comp": Recipe("comp", tunings=("mask",)),
    "wanda-sp": Recipe("wanda-sp"),
    "flap": Recipe("flap"),
    "shortgpt": Recipe("shortgpt"),
    "magnitude": Recipe("magnitude"),
}


def calibration(setting: Setting, draw: int, work: Path) -> str:
    """The calibration text from another place on: draw 0 starts at its beginning."""
    if not draw:
        return setting.calibration
    content = load_text(setting.calibration).content
    start = content.index("\n", len(content) * draw // 4) + 1
    path = work / f"{setting.name}-calibration-{draw}.txt"
    path.write_text(content[start:])
    return str(path)


def measured(setting: Setting, directory: Path) -> dict[str, float]:
    """Perplexity by kind of text."""
    found = {"same": perplexity(directory, setting)}
    if setting.name in OTHER:
        other = Setting(setting.name, setting.model, "", str(OTHER[setting.name]), setting.length)
        found["other"] = perplexity(directory, other)
    return found


def one_run(setting: Setting, sparsity: float, name: str, draw: int, work: Path) -> dict[str, Any]:
    """Prune, tune and measure."""
    recipe, started = RECIPES[name], time.perf_counter()
    out = work / "pruned"
    options = PruneConfig(
        model=setting.model,
        sparsity=sparsity,
        method=recipe.method,
        widths=recipe.widths,
        calibration=CalibrationConfig(text=calibration(setting, draw, work), rows=128),
    )
    report = prune(open_prune(options), OutputOptions(out, overwrite=True)).model_dump()["report"]
    seconds = time.perf_counter() - started
    found = {"as pruned": measured(setting, out)}
    for tuning in recipe.tunings:
        tuned = work / "tuned"
        tune(open_tune(TuneConfig(pruned=out, method=TuneMethod(tuning))), OutputOptions(tuned, overwrite=True))
        found[tuning] = measured(setting, tuned)
    return {
        "model": setting.name,
        "sparsity": sparsity,
        "recipe": name,
        "draw": draw,
        "removed": report["achieved_sparsity"],
        "parameters": report["cut"]["total_parameters"],
        "perplexity": found,
        "seconds": seconds,
    }


def collected(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs in the results file, after adding those that are asked for and missing."""
    path: Path = arguments.results
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(run["model"], run["sparsity"], run["recipe"], run["draw"]) for run in done}
    if arguments.table_only:
        return done
    with tempfile.TemporaryDirectory() as work:
        for draw in arguments.draws:
            for setting in settings(arguments.models):
                for sparsity in arguments.sparsities:
                    for name in arguments.recipes or RECIPES:
                        if (setting.name, sparsity, name, draw) in known:
                            continue
                        run = one_run(setting, sparsity, name, draw, Path(work))
                        done.append(run)
                        with path.open("a") as handle:
                            handle.write(json.dumps(run) + "\n")
                        print(setting.name, sparsity, name, draw, run["perplexity"], flush=True)
    return done


def print_table(runs: list[dict[str, Any]]) -> None:
    """Mean and range over the draws, one line a method."""
    print("| model | asked | method | draws | removed | parameters | same kind of text | another kind |")
    print("|---|---|---|---|---|---|---|---|")
    for model, sparsity in dict.fromkeys((run["model"], run["sparsity"]) for run in runs):
        for name in RECIPES:
            mine = [run for run in runs if (run["model"], run["sparsity"], run["recipe"]) == (model, sparsity, name)]
            for tuning in mine[0]["perplexity"] if mine else ():
                cells = [_span([run["perplexity"][tuning].get(kind) for run in mine]) for kind in ("same", "other")]
                label = name if tuning == "as pruned" else f"{name} + tune --method {tuning}"
                removed = statistics.fmean(run["removed"] for run in mine)
                parameters = statistics.fmean(run["parameters"] for run in mine)
                print(
                    f"| {model} | {sparsity:.0%} | {label} | {len(mine)} | {removed:.1%} | {parameters:,.0f} | "
                    + " | ".join(cells)
                    + " |"
                )


def _span(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    mean = f"{statistics.fmean(found):.2f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.2f} to {max(found):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["stories260K", "tiny", "english-7M"])
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.2, 0.3, 0.5])
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--table-only", action="store_true")
    print_table(collected(parser.parse_args()))


if __name__ == "__main__":
    main()
