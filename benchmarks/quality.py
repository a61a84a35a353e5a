"""Perplexity of every method at three sparsities, without and with tuning, on equal calibration rows.

    python benchmarks/quality.py [--models english-7M stories260K tiny] [--work DIR]

Calibration: the first 128 x 128 tokens of the calibration text. Evaluation: the first 40 x 256 tokens of the evaluation
text (40 x 128 for the built-in model), disjoint rows, mean negative log-likelihood inside each row. Checkpoints other
than the built-in one are read from ../shared and skipped where they are absent.
"""

from __future__ import annotations

import argparse
import tempfile
from math import exp
from pathlib import Path

from settings import Setting, settings

from spinecli.artifacts.directory import OutputOptions
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.checkpoints.tokenizer import load_tokenizer
from spinecli.data.config import CalibrationConfig
from spinecli.data.rows import token_rows
from spinecli.data.text import load_text
from spinecli.pruning.config import PruneConfig, TuneConfig, TuneMethod
from spinecli.pruning.methods import METHODS
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.recovery.tune import tune
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

SPARSITIES = (0.2, 0.3, 0.5)


def perplexity(directory: Path, setting: Setting, rows: int = 40) -> float:
    """Of the checkpoint in `directory` on the first rows of the setting's evaluation text."""
    checkpoint = Checkpoint.open(directory)
    tokens = token_rows(load_tokenizer(directory), load_text(setting.evaluation), rows, setting.length).tokens
    stream = BlockStream(checkpoint, setting.length)
    return exp(float(stream.losses(stream.forward(tokens), tokens).mean()))


def span(report: dict, key: str) -> str:
    """How many units the kept blocks have."""
    found = {shape[key] for shape in report["shapes_after"]}
    return str(min(found)) if len(found) == 1 else f"{min(found)}-{max(found)}"


def row(setting: Setting, sparsity: float, method: str, metric: str | None, tunings: list[str], work: Path) -> str:
    """One line of the table."""
    options = PruneConfig(
        model=setting.model,
        sparsity=sparsity,
        method=method,
        metric=metric,
        calibration=CalibrationConfig(text=setting.calibration, rows=128),
    )
    out = work / f"{setting.name}-{sparsity}-{method}-{metric}"
    report = prune(open_prune(options), OutputOptions(out, overwrite=True)).model_dump()["report"]
    cells = [f"{perplexity(out, setting):.2f}"]
    for name in tunings:
        tuned = work / f"{out.name}-tuned"
        tune(open_tune(TuneConfig(pruned=out, method=TuneMethod(name))), OutputOptions(tuned, overwrite=True))
        cells.append(f"{perplexity(tuned, setting):.2f}")
    removed = report["removed_blocks"]
    cut = f"{span(report, 'heads')} heads, {span(report, 'channels')} channels" + (
        f", without {removed}" if removed else ""
    )
    share, total = report["achieved_sparsity"], report["cut"]["total_parameters"]
    label = f"{method} {metric}" if metric else method
    return f"| {setting.name} | {sparsity:.0%} | {label} | {share:.1%} | {total:,} | {cut} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["english-7M", "stories260K", "tiny"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--metrics", nargs="+", default=["m4", "m1"])
    parser.add_argument("--tunings", nargs="+", default=["mask", "lsq", "auto"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    tunings = arguments.tunings
    print("| model | asked | method | removed | parameters | cut | untuned |", " | ".join(tunings), "|")
    print("|---|---|---|---|---|---|", "---|" * (1 + len(tunings)))
    for setting in settings(arguments.models):
        dense = perplexity(resolve_checkpoint(setting.model), setting)
        print(f"| {setting.name} | | dense | 0 % | | | {dense:.2f} |", "  |" * len(tunings), flush=True)
        for sparsity in arguments.sparsities:
            for method in arguments.methods:
                for metric in arguments.metrics if method == "comp" else [None]:
                    print(row(setting, sparsity, method, metric, tunings, work), flush=True)


if __name__ == "__main__":
    main()
