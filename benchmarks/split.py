"""Split strategies side by side: accuracy at equal virtual time, and time and traffic to a target accuracy.

    python benchmarks/split.py --model minilm-L6 --data sst2 --partition shards:1 --results split-runs.jsonl

Each run is a line in the results file; runs that are there already are not repeated, so the command can be stopped and
started again. The table at the end is over all runs in the file that have the same settings; `accuracy at` reads every
run's last evaluation within the time that the fastest strategy needed for all its rounds. Needs the checkpoints and
data in ../shared, or paths of your own.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from federation import asked_of, found, mean, points, to_target
from resumable_runs import collected

from spinecli.config import make_config
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.federation.config import FederateConfig
from spinecli.federation.history import History
from spinecli.federation.loop import Loop
from spinecli.federation.request import open_request
from spinecli.federation.results import summarised
from spinecli.federation.split.request import SPLIT_STRATEGIES, split_request
from spinecli.federation.split.run import set_up


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-L6")
    parser.add_argument("--data", default="sst2")
    parser.add_argument("--fleet", default="jetson-80")
    parser.add_argument("--partition", default="shards:1")
    parser.add_argument("--strategies", default=",".join(SPLIT_STRATEGIES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cohort", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--largest-batch", type=int, default=24)
    parser.add_argument("--max-length", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--bottom", default="lora")
    parser.add_argument("--top", default="full")
    parser.add_argument("--cut-layer", type=int, default=None)
    parser.add_argument("--selection", default="greedy")
    parser.add_argument("--feature-dtype", default="fp32")
    parser.add_argument("--divergence-limit", type=float, default=0.05)
    parser.add_argument("--evaluate-every", type=int, default=1)
    parser.add_argument("--examined", type=int, default=200, help="held-out examples of an evaluation")
    parser.add_argument("--limit", type=int, default=None, help="at most so many training examples")
    parser.add_argument("--target", type=float, default=0.7)
    parser.add_argument("--results", type=Path, default=Path("split-runs.jsonl"))
    parser.add_argument("--table-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    print_table(collected(asked, one_run), asked.target)


def one_run(strategy: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    config = make_config(
        FederateConfig,
        found(asked.model, "models"),
        {
            **asked_of(strategy, seed, asked),
            "local_steps": asked.iterations,
            "cut_layer": asked.cut_layer or "auto",
            "bottom": asked.bottom,
            "top": asked.top,
            "feature_dtype": asked.feature_dtype,
            "optimizer": asked.optimizer,
            "largest_batch": asked.largest_batch,
            "divergence_limit": asked.divergence_limit,
            "selection": asked.selection,
        },
    )
    with quiet_libraries():
        request = split_request(open_request(config))
        federation = set_up(request)
    history = History(None)
    training, examine = federation.training, federation.evaluate
    Loop(request.config, training, examine, lambda state: None, federation.probe).run(history, lambda record: None)
    result = summarised(history.rounds, None)
    splits = [record.split for record in history.rounds if record.split is not None]
    return {
        "strategy": strategy,
        "seed": seed,
        "cut": request.cut,
        "accuracy": result.accuracy,
        "seconds": result.seconds,
        "bytes": result.bytes,
        "idle_share": result.idle_share,
        "divergence": statistics.fmean(split.divergence for split in splits),
        "infeasible": sum(not split.feasible for split in splits),
        "rows": statistics.fmean(sum(device.batch for device in record.devices) for record in history.rounds),
        "devices": statistics.fmean(len(record.devices) for record in history.rounds),
        "points": points(history.rounds),
        "wall_seconds": time.perf_counter() - started,
    }


def accuracy_at(run: dict[str, Any], seconds: float) -> float:
    """Of the last evaluation within `seconds`; NaN if there was none."""
    return next((accuracy for when, _, accuracy in reversed(run["points"]) if when <= seconds), math.nan)


def print_table(runs: list[dict[str, Any]], target: float) -> None:
    shared = min((run["seconds"] for run in runs), default=0.0)
    print(
        f"\n| strategy | runs | devices, rows | KL | idle | accuracy at {shared:.0f} s | final accuracy "
        f"| time to {target:.0%} | MB to {target:.0%} | whole time | MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for strategy in SPLIT_STRATEGIES:
        mine = [run for run in runs if run["strategy"] == strategy]
        if not mine:
            continue
        reached = [hit for run in mine if (hit := to_target(run, target)) is not None]
        times = f"{mean(hit[0] for hit in reached):.0f} s" if reached else "never"
        sent = f"{mean(hit[1] for hit in reached) / 1e6:.0f}" if reached else ""
        if 0 < len(reached) < len(mine):
            times += f" ({len(reached)} of {len(mine)})"
        accuracies = [run["accuracy"] for run in mine]
        spread = f" ± {statistics.stdev(accuracies):.1%}" if len(mine) > 1 else ""
        early = [accuracy_at(run, shared) for run in mine]
        then = "none yet" if any(map(math.isnan, early)) else f"{mean(early):.1%}"
        print(
            f"| {strategy} | {len(mine)} | {mean(run['devices'] for run in mine):.0f}, "
            f"{mean(run['rows'] for run in mine):.0f} | {mean(run['divergence'] for run in mine):.3f} "
            f"| {mean(run['idle_share'] for run in mine):.0%} | {then} | {mean(accuracies):.1%}{spread} "
            f"| {times} | {sent} | {mean(run['seconds'] for run in mine):.0f} s "
            f"| {mean(run['bytes'] for run in mine) / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
