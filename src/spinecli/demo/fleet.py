"""The demo's second half: LoRA planned for ten simulated boards, and a classifier trained over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import Manifest
from spinecli.data.config import ExamplesConfig
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.federation.config import DataConfig, FederateConfig, TrainConfig
from spinecli.federation.evaluation import evaluate
from spinecli.federation.history import RoundRecord
from spinecli.federation.planning.config import PlanConfig
from spinecli.federation.planning.request import open_request as open_plan
from spinecli.federation.planning.run import decide, plan
from spinecli.federation.request import open_request
from spinecli.federation.run import launch
from spinecli.federation.setup import set_up
from spinecli.progress import Progress, silent

FLEET = "jetson-10"
DATA = "builtin:tiny-topics"
LABELS = 4
EXAMPLES = 1000
ROUNDS = 4
COHORT = 5
# enough for a clear answer in half a minute on one core
LENGTH = 64
LOCAL_STEPS = 10
LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class FleetResult:
    """What planning and training over the fleet produced."""

    plan: Manifest
    federated: Manifest
    accuracy_before: float
    """Of the same model on the same held-out data before the first round, with a head that knows nothing yet."""


def run_fleet(
    model: Path, plan_out: Path, fed_out: Path, announce: Callable[[str], None], progress: Progress = silent
) -> FleetResult:
    """Plan LoRA for the fleet, and fine-tune `model` over it by that plan; existing outputs are replaced.

    Args:
        announce: called before each step with the command line that does the same.
    """
    announce(
        f"spine plan {model} --fleet {FLEET} --labels {LABELS} --length {LENGTH} --local-steps {LOCAL_STEPS} "
        f"--out {plan_out}"
    )
    goal = PlanConfig(model=str(model), fleet=FLEET, labels=LABELS, length=LENGTH, local_steps=LOCAL_STEPS)
    planned = plan(decide(open_plan(goal)), OutputOptions(plan_out, overwrite=True))
    announce(
        f"spine fed-launch {model} --data {DATA} --limit {EXAMPLES} --strategy legend --fleet {FLEET} "
        f"--plan {plan_out} --rounds {ROUNDS} --cohort {COHORT} --local-steps {LOCAL_STEPS} --max-length {LENGTH} "
        f"--learning-rate {LEARNING_RATE:g} --out {fed_out}"
    )
    config = FederateConfig(
        model=str(model),
        strategy="legend",
        fleet=FLEET,
        plan=plan_out,
        data=DataConfig(train=DATA, examples=ExamplesConfig(limit=EXAMPLES), max_length=LENGTH),
        train=TrainConfig(rounds=ROUNDS, cohort=COHORT, local_steps=LOCAL_STEPS, learning_rate=LEARNING_RATE),
    )

    def heard(record: RoundRecord) -> None:
        progress("rounds on the fleet", record.round + 1, ROUNDS)

    with quiet_libraries():
        request = open_request(config)
        untrained = set_up(request)
        before = evaluate(untrained.base, untrained.strategy.model(), request.evaluation)
        federated = launch(request, OutputOptions(fed_out, overwrite=True), listener=heard)
    return FleetResult(planned, federated, before.accuracy)
