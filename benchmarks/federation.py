"""Federated strategies side by side: accuracy, and virtual time and traffic to a target accuracy.

    python benchmarks/federation.py --model minilm-L6 --data sst2 --partition dirichlet:0.5 --results runs.jsonl

Each run is a line in the results file; runs that are there already are not repeated, so the command can be stopped and
started again. The table at the end is over all runs in the file that have the same settings. Needs the checkpoints and
data in ../shared, or paths of your own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from resumable_runs import collected

from spinecli.checkpoints.tokenizer import load_tokenizer
from spinecli.config import make_config
from spinecli.data.encoding import encode
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.federation.config import FederateConfig
from spinecli.federation.evaluation import evaluate
from spinecli.federation.history import History, Measurement, RoundRecord
from spinecli.federation.loop import Loop
from spinecli.federation.request import open_request
from spinecli.federation.results import summarised
from spinecli.federation.run import set_up
from spinecli.federation.strategies import STRATEGIES
from spinecli.federation.strategies.strategy import GlobalModel

SHARED = Path(__file__).resolve().parents[2] / "shared"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-L6")
    parser.add_argument("--data", default="sst2")
    parser.add_argument("--fleet", default="jetson-80")
    parser.add_argument("--partition", default="dirichlet:0.5")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--cohort", type=int, default=10)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weighting", choices=("examples", "equal"), default="examples")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--smallest-rank", type=int, default=2)
    parser.add_argument("--largest-rank", type=int, default=8)
    parser.add_argument("--evaluate-every", type=int, default=4)
    parser.add_argument("--examined", type=int, default=240, help="held-out examples of an evaluation on the way")
    parser.add_argument("--limit", type=int, default=None, help="at most so many training examples")
    parser.add_argument("--target", type=float, default=0.7)
    parser.add_argument("--results", type=Path, default=Path("federation-runs.jsonl"))
    parser.add_argument("--table-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    print_table(collected(asked, one_run), asked.target)


def asked_of(strategy: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """The options that runs of adapters and split runs have alike."""
    return {
        "data": found(asked.data, "datasets"),
        "strategy": strategy,
        "fleet": asked.fleet,
        "partition": asked.partition,
        "limit": asked.limit,
        "max_length": asked.max_length,
        "rounds": asked.rounds,
        "cohort": asked.cohort,
        "batch_size": asked.batch_size,
        "learning_rate": asked.learning_rate,
        "evaluate_every": asked.evaluate_every,
        "evaluation_limit": asked.examined,
        "seed": seed,
    }


def one_run(strategy: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    config = make_config(
        FederateConfig,
        found(asked.model, "models"),
        {
            **asked_of(strategy, seed, asked),
            "local_steps": asked.local_steps,
            "weighting": asked.weighting,
            "smallest_rank": asked.smallest_rank,
            "largest_rank": asked.largest_rank,
            "sparsity": asked.sparsity,
            "prune_interval": asked.local_steps,
        },
    )
    with quiet_libraries():
        request = open_request(config)
        federation = set_up(request)
    whole = encode(request.splits.evaluation, load_tokenizer(request.checkpoint.path), asked.max_length)
    evaluations = 0

    def measure(model: GlobalModel) -> Measurement:
        nonlocal evaluations
        evaluations += 1
        last = evaluations == -(-asked.rounds // asked.evaluate_every)
        return evaluate(federation.base, model, whole if last else request.evaluation)

    loop = Loop(request.config, federation.training, measure, lambda state: None)
    history = History(None)
    loop.run(history, lambda record: None)
    result = summarised(history.rounds, None)
    return {
        "strategy": strategy,
        "seed": seed,
        "accuracy": result.accuracy,
        "seconds": result.seconds,
        "bytes": result.bytes,
        "idle_share": result.idle_share,
        "points": points(history.rounds),
        "ratio": sum(each.ratio * each.devices for each in federation.strategy.model().served)
        / len(federation.setting.nodes),
        "wall_seconds": time.perf_counter() - started,
    }


def found(name: str, kind: str) -> str:
    """A name in ../shared, or what the user typed."""
    return str(SHARED / kind / name) if (SHARED / kind / name).exists() else name


def points(rounds: list[RoundRecord]) -> list[tuple[float, int, float]]:
    """(seconds, bytes, accuracy) at every evaluation."""
    sent, measured = 0, []
    for record in rounds:
        sent += record.bytes
        if record.evaluation is not None:
            measured.append((record.ended, sent, record.evaluation.accuracy))
    return measured


def to_target(run: dict[str, Any], target: float) -> tuple[float, int] | None:
    """Seconds and bytes at the first evaluation at or above the target."""
    return next(((seconds, sent) for seconds, sent, accuracy in run["points"] if accuracy >= target), None)


def print_table(runs: list[dict[str, Any]], target: float) -> None:
    print(
        f"\n| strategy | runs | removed | final accuracy | best on the way | time to {target:.0%} | MB to {target:.0%} "
        "| whole time | MB | idle |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for strategy in STRATEGIES:
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
        best = mean(max(point[2] for point in run["points"]) for run in mine)
        print(
            f"| {strategy} | {len(mine)} | {mean(run['ratio'] for run in mine):.0%} | {mean(accuracies):.1%}{spread} "
            f"| {best:.1%} | {times} | {sent} | {mean(run['seconds'] for run in mine):.0f} s "
            f"| {mean(run['bytes'] for run in mine) / 1e6:.0f} | {mean(run['idle_share'] for run in mine):.0%} |"
        )


def mean(values: Any) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
