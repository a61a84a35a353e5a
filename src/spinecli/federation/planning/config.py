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
        Option(
            "A fleet's .toml file, or a built-in one: jetson-80, phones-40, uniform-10, with any number.", decides=False
        ),
    ]
    rank: Annotated[float, Field(ge=1), Option("Mean rank over the blocks.")] = 8.0
    rank_step: Annotated[
        int, Field(ge=0), Option("Growth of the rank from one block to the next; 0 for equal ranks.")
    ] = 1
    targets: Annotated[
        str, Option("Adapted projections: all, attention, query-value, or names separated by commas.")
    ] = "all"
    labels: Annotated[
        int | None,
        Field(ge=2),
        Option(
            "Classes of a classification head that is trained and sent along; encoders need it, unless they are "
            "classifiers.",
            default="the checkpoint's own task",
        ),
    ] = None
    batch_size: Annotated[int, Field(ge=1), Option("Rows of a training step.")] = 16
    length: Annotated[int, Field(ge=1), Option("Tokens of a row.")] = 128
    local_steps: Annotated[int, Field(ge=1), Option("Training steps of a round.")] = 20
    max_waiting: Annotated[
        float, Field(ge=0, le=1), Option("Share of a round that devices may wait on average, 0 to 1.")
    ] = MAX_WAITING
    coverage: Annotated[
        float,
        Field(gt=0, le=1),
        Option(
            "Share of the devices from which on one more adds nothing to a block; more makes deeper and longer rounds."
        ),
    ] = COVERAGE
    traffic_budget: Annotated[
        float | None,
        Field(gt=0),
        Option("Megabytes (10^6 bytes) a round, up and down, of all devices together.", default="no limit"),
    ] = None
    min_depth: Annotated[int, Field(ge=1), Option("Blocks that every device trains at least.")] = 1
    dtype: Annotated[Dtype, Option("Precision of the frozen weights in a device's memory.")] = "float32"
    seed: Seed = 0
