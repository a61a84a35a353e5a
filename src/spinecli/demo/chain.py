"""The demo's chain of steps on the built-in model, as the commands would run them.

Prune, tune and evaluate; then plan LoRA for a small fleet and fine-tune the tuned model over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import Manifest
from spinecli.data.config import CalibrationConfig
from spinecli.demo.fleet import FleetResult, run_fleet
from spinecli.evaluation.config import EvaluateConfig, PerplexityConfig
from spinecli.evaluation.results import Evaluation
from spinecli.evaluation.run import evaluate
from spinecli.evaluation.session import Listeners
from spinecli.progress import Progress, silent
from spinecli.pruning.config import PruneConfig, TuneConfig
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.recovery.tune import tune
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

MODEL = "builtin:tiny"
TEXT = "builtin:tiny-evaluation"
ROWS = 64
WINDOW = 128


@dataclass(frozen=True)
class DemoResult:
    """What the five steps produced."""

    pruned: Manifest
    tuned: Manifest
    evaluation: Evaluation
    fleet: FleetResult


def run_demo(out: Path, sparsity: float, announce: Callable[[str], None], progress: Progress = silent) -> DemoResult:
    """Run the chain into `out/pruned`, `out/tuned`, `out/results`, `out/plan` and `out/fed`.

    What an earlier demo left there is replaced.

    Args:
        announce: called before each step with the command line that does the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the built-in model's matrices are too small to share
    pruned, tuned, results = out / "pruned", out / "tuned", out / "results"
    announce(f"spine prune {MODEL} --sparsity {sparsity:g} --method comp --calibration-rows {ROWS} --out {pruned}")
    options = PruneConfig(model=MODEL, sparsity=sparsity, method="comp", calibration=CalibrationConfig(rows=ROWS))
    pruned_manifest = prune(open_prune(options), OutputOptions(pruned, overwrite=True), progress=progress)
    announce(f"spine tune {pruned} --out {tuned}")
    tuned_manifest = tune(open_tune(TuneConfig(pruned=pruned)), OutputOptions(tuned, overwrite=True), progress=progress)
    announce(
        f"spine eval {tuned} --against {MODEL} --against {pruned} --perplexity {TEXT} --window {WINDOW} --latency "
        f"--out {results}"
    )
    measures = EvaluateConfig(
        model=str(tuned),
        against=(MODEL, str(pruned)),
        perplexity=PerplexityConfig(texts=(TEXT,), window=WINDOW),
        latency=True,
    )
    evaluation, _ = evaluate(measures, OutputOptions(results, overwrite=True), Listeners(progress))
    fleet = run_fleet(tuned, out / "plan", out / "fed", announce, progress)
    return DemoResult(pruned_manifest, tuned_manifest, evaluation, fleet)
