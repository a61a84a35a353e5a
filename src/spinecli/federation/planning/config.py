"""What `spine plan` is asked for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from spinecli.config import Config, Dtype, Model, Option, Seed

MAX_WAITING = 0.6
"""Share of a round that LEGEND lets devices wait, with a plan or without one."""
COVERAGE = 0.5
"""Share of the devices from which on LEGEND counts a block as trained by enough of them."""


class PlanConfig(Config):
    """How deep LoRA may reach on which fleet, and what a round may cost."""

    model: Model
    fleet: Annotated[
        str,
        Option("Fleet to plan for: a .toml file, or jetson-N, phones-N or uniform-N for N devices.", decides=False),
    ]
    rank: Annotated[float, Field(ge=1), Option("Mean LoRA rank over the blocks.")] = 8.0
    rank_step: Annotated[
        int, Field(ge=0), Option("Increase of the rank from one block to the next; 0 for equal ranks.")
    ] = 1
    targets: Annotated[
        str, Option("Projections with LoRA: all, attention, query-value, or names separated by commas.")
    ] = "all"
    labels: Annotated[
        int | None,
        Field(ge=2),
        Option(
            "Number of labels of a classification head that is trained and sent as well; encoders need it, unless they "
            "are classifiers.",
            default="the checkpoint's own task",
        ),
    ] = None
    batch_size: Annotated[int, Field(ge=1), Option("Number of rows in a training step.")] = 16
    length: Annotated[int, Field(ge=1), Option("Number of tokens in a row.")] = 128
    local_steps: Annotated[int, Field(ge=1), Option("Number of training steps of a device in a round.")] = 20
    max_waiting: Annotated[
        float, Field(ge=0, le=1), Option("Share of a round that devices may wait on average, from 0 to 1.")
    ] = MAX_WAITING
    coverage: Annotated[
        float,
        Field(gt=0, le=1),
        Option("Share of the devices at which one more adds nothing to a block; more makes rounds deeper and longer."),
    ] = COVERAGE
    traffic_budget: Annotated[
        float | None,
        Field(gt=0),
        Option(
            "Limit on the traffic of all devices in a round, up and down, in megabytes (10^6 bytes).",
            default="no limit",
        ),
    ] = None
    min_depth: Annotated[int, Field(ge=1), Option("Smallest number of blocks that a device trains.")] = 1
    dtype: Annotated[Dtype, Option("Precision of the frozen weights in a device's memory.")] = "float32"
    seed: Seed = 0
