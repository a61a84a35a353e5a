"""From what a user has typed to the options of a federated run, the same way for every command that starts one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spinecli.commands.fed_launch_options import (
    FeatureDtype,
    Optimizer,
    Schedule,
    Score,
    Selection,
    Task,
    Way,
    Weighting,
)

if TYPE_CHECKING:
    from spinecli.federation.request import FederateConfig


def federated_options(
    *,
    model: str,
    data: str,
    strategy: str,
    text_column: str | None,
    pair_column: str | None,
    label_column: str | None,
    task: Task | None,
    max_length: int,
    rounds: int,
    cohort: int,
    deadline: float | None,
    local_steps: int,
    batch_size: int,
    learning_rate: float | None,
    schedule: Schedule,
    clip_norm: float,
    weighting: Weighting,
    rank: int,
    smallest_rank: int,
    largest_rank: int,
    lora_scale: float,
    targets: str,
    sparsity: float,
    prune_interval: int,
    score: Score | None,
    evaluate_every: int,
    evaluation_limit: int,
    target_accuracy: float | None,
    deploy: bool,
    seed: int,
    device: str,
    dtype: str,
) -> FederateConfig:
    """The options that both commands have, for a fleet simulated in this process; unchecked, but for device and dtype.

    Raises: what `compute_options` can raise.
    """
    from spinecli.checkpoints.stream.block_stream import compute_options
    from spinecli.data.example_columns import DataOptions
    from spinecli.federation.request import FederateConfig
    from spinecli.federation.split.request import SPLIT_RATE
    from spinecli.federation.strategies import SPLITTING
    from spinecli.federation.strategies.strategy import TrainConfig

    usual_rate = SPLIT_RATE if strategy in SPLITTING else TrainConfig.learning_rate
    tuning = TrainConfig(
        rank=rank,
        smallest_rank=smallest_rank,
        largest_rank=largest_rank,
        scale=lora_scale,
        rounds=rounds,
        local_steps=local_steps,
        batch_size=batch_size,
        length=max_length,
        learning_rate=usual_rate if learning_rate is None else learning_rate,
        weighting=weighting.value,
        sparsity=sparsity,
        prune_interval=prune_interval,
        score=score.value if score else None,
    )
    return FederateConfig(
        model=model,
        data=data,
        strategy=strategy,
        data_options=DataOptions(
            text_column=text_column,
            pair_column=pair_column,
            label_column=label_column,
            task=task.value if task else None,
        ),
        max_length=max_length,
        rounds=rounds,
        cohort=cohort,
        deadline=deadline,
        tuning=tuning,
        targets=targets,
        schedule=schedule.value,
        clip_norm=clip_norm,
        evaluate_every=evaluate_every,
        evaluation_limit=evaluation_limit,
        target_accuracy=target_accuracy,
        deploy=deploy,
        seed=seed,
        compute=compute_options(device, dtype),
    )


def split_choices(
    strategy: str,
    *,
    cut_layer: str | None,
    bottom: Way | None,
    top: Way | None,
    feature_dtype: FeatureDtype | None,
    ingress: float | None,
    largest_batch: int | None,
    divergence_limit: float | None,
    selection: Selection | None,
    optimizer: Optimizer | None,
    deploy: bool,
) -> dict[str, str | int | float]:
    """What was chosen of the options of split training, by option name.

    Raises: OptionError if one was chosen for a strategy that does not split, or --deploy for one that does.
    """
    from spinecli.errors import OptionError
    from spinecli.federation.strategies import SPLITTING

    given = {
        "--cut-layer": cut_layer,
        "--bottom": bottom and bottom.value,
        "--top": top and top.value,
        "--feature-dtype": feature_dtype and feature_dtype.value,
        "--ingress": ingress,
        "--largest-batch": largest_batch,
        "--divergence-limit": divergence_limit,
        "--selection": selection and selection.value,
        "--optimizer": optimizer and optimizer.value,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen and strategy not in SPLITTING:
        raise OptionError(f"{next(iter(chosen))} belongs to split training; {strategy} has no use for it.")
    if deploy and strategy in SPLITTING:
        raise OptionError(f"--deploy has no use with {strategy}, which writes the joined checkpoint; drop it.")
    return chosen
