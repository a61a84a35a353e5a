"""The demo: a recipe on the built-in model, up to a classifier that is trained over ten simulated boards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import JsonValue

from spinecli.api import EvaluationResult, Result
from spinecli.artifacts.context import RunContext
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.evaluation.results import Evaluation
from spinecli.federation.config import FederateConfig
from spinecli.federation.evaluation import evaluate
from spinecli.federation.request import open_request
from spinecli.federation.results import FederatedResult
from spinecli.federation.run import set_up
from spinecli.recipes.recipe import Recipe, read_recipe
from spinecli.recipes.run import run_recipe

RECIPE = Path(__file__).parent / "assets" / "recipe.yaml"


@dataclass(frozen=True)
class DemoResult:
    """What the six steps produced."""

    pruned: Mapping[str, JsonValue]
    evaluation: Evaluation
    plan: Mapping[str, JsonValue]
    federated: FederatedResult
    accuracy_before: float
    """Of the same model on the same held-out data before the first round, with a head that knows nothing yet."""


def demo_recipe(sparsity: float) -> Recipe:
    """The demo's chain with another share to remove."""
    recipe = read_recipe(RECIPE)
    steps = [
        replace(step, values={**step.values, "sparsity": sparsity}) if step.command == "prune" else step
        for step in recipe.steps
    ]
    return Recipe(tuple(steps))


def run_demo(out: Path, sparsity: float, context: RunContext) -> DemoResult:
    """Run the chain into `out/pruned`, `out/tuned`, `out/healed`, `out/results`, `out/plan` and `out/fed`.

    What an earlier demo left there and would be the same stays, anything else of it is replaced.

    Args:
        context: its note hears, before each step, the command line that does the same.
    """
    torch.set_num_threads(1)  # the built-in model's matrices are too small to share
    with quiet_libraries():
        done = run_recipe(demo_recipe(sparsity), out, context)
        results: dict[str, Result] = {found.step.name: found.result for found in done}
        measured, federated = results["results"], results["fed"]
        assert isinstance(measured, EvaluationResult)
        assert isinstance(federated.config, FederateConfig)
        request = open_request(federated.config)
        untrained = set_up(request)
        before = evaluate(untrained.base, untrained.strategy.model(), request.evaluation)
    return DemoResult(
        pruned=results["pruned"].figures,
        evaluation=measured.evaluation,
        plan=results["plan"].figures,
        federated=FederatedResult.model_validate(federated.figures),
        accuracy_before=before.accuracy,
    )
