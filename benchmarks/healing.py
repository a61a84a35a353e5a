"""What a short training gives back to a cut model: perplexity of every kind of text, and questions, before and after.

    python benchmarks/healing.py MODEL --work DIR [--sparsity 0.2 0.3 0.5] [--tokens 250000 500000]
        [--recipes kl lm llm-pruner] [--questions 200] [--dtype bfloat16] [--table-only]

MODEL is a directory, such as the SmolLM2-135M-Instruct that ../shared/models/fetch-smollm2 writes. Cuts are those of
`spine prune`, calibrated on WikiText-2's validation split, 128 x 128 tokens. Healing trains on that split and on news
(ag_news' training split), half each; "encyclopedia" and "news" are the same kinds of text, other documents of them, and
the other kinds of the panel are never trained on. `kl` is `spine heal` as it is by default, `lm` the same with the loss
on the text, `llm-pruner` what LLM-Pruner's users train, LoRA of rank 8 on the loss on the text, with the steps, rows
and learning rate of the others. Perplexity as in panel.py. "back" is the share of what the cut had lost in
log-perplexity that training gives back: on WikiText-2, over the kinds that were trained on, and over the others.
Questions: ARC-easy and PIQA by lm-eval, normalised accuracy.

Each run is a line in DIR/healing.jsonl; runs and directories that are there already are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from panel import WIKI, kinds, measured
from settings import SHARED

from spinecli.artifacts.directory import OutputOptions
from spinecli.config import make_config
from spinecli.data.config import CalibrationConfig
from spinecli.healing.config import HealConfig
from spinecli.healing.request import open_request as open_heal
from spinecli.healing.run import heal
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

TEXT = [str(WIKI / "validation.txt"), str(SHARED / "datasets" / "ag_news" / "train.jsonl")]
TRAINED_ON = ("encyclopedia", "news")
RECIPES: dict[str, dict[str, Any]] = {
    "kl": {},
    "lm": {"loss": "lm"},
    "llm-pruner": {"loss": "lm", "rank": 8},
    "full": {"train": "full"},
    "norms": {"train": "norms"},
    "both": {"loss": "both"},
}
QUESTIONS = {
    "arc_easy": f"""dataset_kwargs: {{data_files: {{test: {SHARED / "datasets" / "arc_easy" / "test.jsonl"}}}}}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices.text}}}}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
""",
    "piqa": f"""dataset_kwargs: {{data_files: {{test: {SHARED / "datasets" / "piqa" / "validation.jsonl"}}}}}
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_choice: "{{{{[sol1, sol2]}}}}"
doc_to_target: label
""",
}


def answered(directory: Path, limit: int, work: Path) -> dict[str, float]:
    """The share of questions that the model answers, by lm-eval's own model class."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    work.mkdir(exist_ok=True)
    for name, lines in QUESTIONS.items():
        head = f"task: local_{name}\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        (work / f"{name}.yaml").write_text(head + lines + "metric_list: [{metric: acc_norm}]\n")
    manager = TaskManager(include_path=str(work), include_defaults=False)
    found: Any = simple_evaluate(
        "hf",
        model_args={"pretrained": str(directory), "dtype": "float32"},
        tasks=[f"local_{name}" for name in QUESTIONS],
        limit=limit,
        batch_size=8,
        device="cpu",
        task_manager=manager,
    )
    return {name: found["results"][f"local_{name}"]["acc_norm,none"] for name in QUESTIONS}


def cut(model: Path, sparsity: float, out: Path) -> Path:
    """The cut directory, made if it is not there."""
    if not out.exists():
        text = CalibrationConfig(text=(str(WIKI / "validation.txt"),), rows=128)
        prune(open_prune(PruneConfig(model=str(model), sparsity=sparsity, calibration=text)), OutputOptions(out))
    return out


def healed(pruned: Path, key: dict[str, Any], arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Heal a cut as `key` says; what that took."""
    asked = {"text": TEXT, "tokens": key["tokens"], "dtype": key["dtype"], **RECIPES[key["recipe"]], **arguments.set}
    start, begun = time.process_time(), time.perf_counter()
    manifest = heal(open_heal(make_config(HealConfig, str(pruned), asked)), OutputOptions(out, overwrite=True))
    report: dict[str, Any] = manifest.report
    return {
        "cpu_seconds": time.process_time() - start,
        "seconds": time.perf_counter() - begun,
        "peak_memory": manifest.measured.peak_memory_bytes,
        "held_out": [report["held_out_before"], report["held_out_after"]],
        "curve": report["curve"],
    }


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of the table, from the results file or measured now."""
    work: Path = arguments.work
    path = work / "healing.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.table_only:
        return rows
    panel = kinds(work / "panel")

    def record(key: dict[str, Any], directory: Path, **found: Any) -> None:
        questions = answered(directory, arguments.questions, work / "tasks") if arguments.questions else {}
        rows.append({**key, **found, **measured(directory, panel), **questions})
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    def known(key: dict[str, Any]) -> bool:
        return any(key.items() <= row.items() for row in rows)

    if not known(key := {"recipe": "dense"}):
        record(key, arguments.model)
    for sparsity in arguments.sparsity:
        pruned = cut(arguments.model, sparsity, work / f"cut-{sparsity:.0%}")
        if not known(key := {"recipe": "cut", "sparsity": sparsity}):
            record(key, pruned)
        for tokens in arguments.tokens:
            for recipe in arguments.recipes:
                key = {"recipe": recipe, "sparsity": sparsity, "tokens": tokens, "dtype": arguments.dtype}
                key |= {"set": arguments.set}
                if not known(key):
                    out = work / f"healed-{sparsity:.0%}-{recipe}-{tokens}"
                    record(key, out, **healed(pruned, key, arguments, out))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    [dense] = [row for row in rows if row["recipe"] == "dense"]
    cuts = {row["sparsity"]: row for row in rows if row["recipe"] == "cut"}
    names = [name for name in ("encyclopedia", "news", "stories", "manual", "drama", "instructions") if name in dense]
    others = [name for name in names if name not in TRAINED_ON]
    head = ["removed", "healed by", "tokens", "held-out", "WikiText-2", *names]
    head += ["WikiText-2 back", "trained kinds back", "other kinds back", "ARC-easy", "PIQA", "CPU s", "peak GB"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in sorted(rows, key=lambda row: (row.get("sparsity", 0), row.get("tokens", 0))):
        cells = [f"{row['sparsity']:.0%}" if "sparsity" in row else "", row["recipe"]]
        cells += [f"{row['tokens'] / 1e6:g} M" if "tokens" in row else ""]
        if row.get("set"):
            cells[1] += f" {row['set']}"
        cells += [" → ".join(f"{value:.3f}" for value in row.get("held_out", []))]
        cells += [f"{row['wikitext2']:.2f}", *(f"{row[name]:.1f}" for name in names)]
        if "tokens" in row:
            before = cuts[row["sparsity"]]
            cells += [f"{back(row, before, dense, kind):.0%}" for kind in (["wikitext2"], TRAINED_ON, others)]
        else:
            cells += [""] * 3
        cells += [f"{row[name]:.3f}" if name in row else "" for name in QUESTIONS]
        cells += [f"{row['cpu_seconds']:.0f}", f"{row['peak_memory'] / 1e9:.2f}"] if "tokens" in row else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def back(row: dict[str, Any], before: dict[str, Any], dense: dict[str, Any], names: Sequence[str]) -> float:
    """The share of the lost log-perplexity that is back, lost and back summed over kinds of text."""
    lost = sum(math.log(before[name] / dense[name]) for name in names)
    return sum(math.log(before[name] / row[name]) for name in names) / lost


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.2, 0.3, 0.5])
    parser.add_argument("--tokens", type=int, nargs="*", default=[250_000, 500_000])
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=["kl", "lm", "llm-pruner"])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--set", type=json.loads, default={}, help="options of spine heal, as JSON")
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    print(table(run(arguments)))


if __name__ == "__main__":
    main()
