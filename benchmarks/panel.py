"""A real pretrained model, pruned and measured on every kind of text of a panel: what the choice of the text is worth.

    python benchmarks/panel.py MODEL --results panel.jsonl [--sparsity 0.2 0.3 0.5] [--calibration self wiki]
        [--effort fast normal best] [--widths uniform adaptive] [--work DIR]
        [--table-only]

MODEL is a directory, such as the SmolLM2-135M-Instruct that ../shared/models/fetch-smollm2 writes. `wiki` calibrates on
WikiText-2's validation split, 128 x 128 tokens, as the public tools of ../shared/models/PEERS.md did; other words are
those of `spine prune --calibration`, with the default number of rows. Perplexity: the first 10 x 512 tokens of each
kind that ../shared/texts/make-panel writes, and the first 20 x 512 of WikiText-2's test split; "ratio" is the geometric
mean over the kinds of pruned / dense. Cost: CPU seconds of the whole command, and in forward passes of the blocks over
its calibration rows, timed in the same process. One thread.

Each run is a line in the results file; runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from quality import perplexity
from settings import SHARED, Setting

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import Manifest
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.data.calibration_file import load_rows
from spinecli.data.config import CalibrationConfig
from spinecli.pruning.config import Effort, PruneConfig, Widths
from spinecli.pruning.request import open_request
from spinecli.pruning.run import prune

WIKI = SHARED / "datasets" / "wikitext2"


def kinds(work: Path) -> dict[str, Path]:
    """The panel's texts by kind."""
    subprocess.run([sys.executable, str(SHARED / "texts" / "make-panel"), str(work)], check=True)
    return {path.stem: path for path in sorted(work.glob("*.txt"))}


def measured(directory: Path | str, panel: dict[str, Path]) -> dict[str, float]:
    """Perplexity by kind, and on WikiText-2's test split as "wikitext2"."""
    found = {}
    for name, path, rows in [(name, path, 10) for name, path in panel.items()] + [("wikitext2", WIKI / "test.txt", 20)]:
        setting = Setting(name, str(directory), "", str(path), 512)
        found[name] = perplexity(Path(directory), setting, rows=rows)
    return found


def pass_seconds(model: Path, directory: Path) -> float:
    """CPU seconds of a forward pass of the dense blocks over the rows that a cut was calibrated on."""
    checkpoint = Checkpoint.open(model)
    rows = load_rows(directory, int(checkpoint.config.vocab_size))
    stream = BlockStream(checkpoint, rows.length)
    hidden = stream.embed(rows.tokens)
    start = time.process_time()
    for block in stream.loaded_blocks():
        hidden = stream.run(block, hidden)
    return time.process_time() - start


def run(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """All rows of the table, from the results file or measured now."""
    path: Path = arguments.results
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.table_only:
        return rows
    panel = kinds(work / "panel")

    def record(row: dict[str, Any]) -> None:
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if not any(row["calibration"] == "dense" for row in rows):
        record({"calibration": "dense", "sparsity": 0.0, **measured(arguments.model, panel)})
    for words in arguments.calibration:
        for effort in arguments.effort:
            for widths in arguments.widths:
                for sparsity in arguments.sparsity:
                    key = {"calibration": words, "sparsity": sparsity, "effort": effort, "widths": widths}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    record({**key, **pruned(arguments.model, key, work, panel)})
    return rows


def pruned(model: Path, key: dict[str, Any], work: Path, panel: dict[str, Path]) -> dict[str, Any]:
    """Cut the model as `key` says, and measure what came of it."""
    wiki = key["calibration"] == "wiki"
    text = (str(WIKI / "validation.txt"),) if wiki else tuple(key["calibration"].split("+"))
    config = PruneConfig(
        model=str(model),
        sparsity=key["sparsity"],
        effort=Effort(key["effort"]),
        widths=Widths(key["widths"]),
        calibration=CalibrationConfig(text=text, rows=128 if wiki else None),
    )
    out = work / "-".join(str(value) for value in key.values()).replace("/", "_")
    start = time.process_time()
    manifest: Manifest = prune(open_request(config), OutputOptions(out, overwrite=True))
    spent = time.process_time() - start
    report: dict[str, Any] = manifest.report
    return {
        "achieved": report["achieved_sparsity"],
        "removed_blocks": len(report["removed_blocks"]),
        "cpu_seconds": spent,
        "passes": spent / pass_seconds(model, out),
        "peak_memory": manifest.measured.peak_memory_bytes,
        **measured(out, panel),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    [dense] = [row for row in rows if row["calibration"] == "dense"]
    names = [name for name in dense if name not in ("calibration", "sparsity", "wikitext2")]
    head = ["calibrated on", "removed", "effort, widths", "WikiText-2", *names, "ratio", "CPU s", "passes", "peak GB"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        ratio = math.exp(sum(math.log(row[name] / dense[name]) for name in names) / len(names))
        cells = [row["calibration"], f"{row['sparsity']:.0%}", f"{row.get('effort', '')}, {row.get('widths', '')}"]
        cells += [f"{row['wikitext2']:.2f}", *(f"{row[name]:.1f}" for name in names), f"{ratio:.2f}"]
        if row is not dense:
            cells += [f"{row['cpu_seconds']:.0f}", f"{row['passes']:.1f}", f"{row['peak_memory'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.2, 0.3, 0.5])
    parser.add_argument("--calibration", nargs="*", default=["self", "wiki"])
    parser.add_argument("--effort", nargs="*", default=["normal"])
    parser.add_argument("--widths", nargs="*", default=["uniform"])
    parser.add_argument("--work", type=Path, help="keep what is cut here")
    parser.add_argument("--table-only", action="store_true")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        print(table(run(arguments, arguments.work or Path(passing))))


if __name__ == "__main__":
    main()
