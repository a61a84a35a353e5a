from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinecli.lora.planning.capacity import Capacities, Capacity, Observation
from spinecli.lora.planning.ranks import completion_table, rank_distribution, rank_sums

SECONDS = st.floats(1e-6, 1e3)
CAPACITIES = st.builds(Capacity, SECONDS, SECONDS, SECONDS, st.floats(1, 1e6), SECONDS)


def observed(capacity: Capacity, depth: int, rank_sum: int, steps: int) -> Observation:
    """A round as a device of that capacity goes through it."""
    return Observation(
        depth=depth,
        rank_sum=rank_sum,
        steps=steps,
        forward_seconds=steps * capacity.forward_seconds,
        backward_seconds=steps * depth * capacity.block_seconds,
        transferred_bytes=round(rank_sum * capacity.rank_bytes),
        transfer_seconds=rank_sum * capacity.rank_seconds + capacity.latency_seconds,
    )


@given(CAPACITIES, st.integers(1, 32), st.integers(1, 500), st.integers(1, 50))
def test_one_round_tells_the_capacity_and_the_capacity_predicts_every_depth(
    capacity: Capacity, depth: int, more: int, steps: int
) -> None:
    blocks = 32
    ranks = rank_distribution(blocks, blocks + more)
    sums = rank_sums(ranks)
    seen = observed(capacity, depth, int(sums[depth - 1]), steps).capacity(capacity.latency_seconds)
    assert seen.forward_seconds == pytest.approx(capacity.forward_seconds)
    assert seen.block_seconds == pytest.approx(capacity.block_seconds)
    assert seen.rank_seconds == pytest.approx(capacity.rank_seconds, rel=1e-3, abs=1e-9)
    table = completion_table(Capacities.of([capacity]), ranks, steps, torch.zeros(blocks))
    for k in (1, depth, blocks):
        wanted = steps * (capacity.forward_seconds + k * capacity.block_seconds)
        wanted += capacity.rank_seconds * int(sums[k - 1]) + capacity.latency_seconds
        assert float(table.seconds[0, k - 1]) == pytest.approx(wanted)
        assert float(table.traffic_bytes[0, k - 1]) == pytest.approx(capacity.rank_bytes * int(sums[k - 1]))


def test_the_average_keeps_four_fifths_of_the_old_and_reaches_a_new_speed() -> None:
    slow, fast = Capacity(1.0, 1.0, 1.0), Capacity(0.5, 0.5, 0.5)
    assert slow.updated(fast).forward_seconds == pytest.approx(0.9)
    estimate = slow
    for _ in range(30):
        estimate = estimate.updated(fast)
    assert estimate.block_seconds == pytest.approx(0.5, rel=0.01)


@given(st.lists(CAPACITIES, min_size=1, max_size=5))
def test_capacities_are_stored_and_read_again(capacities: list[Capacity]) -> None:
    assert [Capacity(**json.loads(json.dumps(asdict(each)))) for each in capacities] == capacities
    stacked = Capacities.of(capacities)
    assert stacked.matrix.shape == (len(capacities), 5)
    assert [stacked.single(index) for index in range(len(capacities))] == capacities
    assert stacked.block_seconds.tolist() == [each.block_seconds for each in capacities]


@pytest.mark.parametrize("missing", ["depth", "rank_sum", "steps"])
def test_a_round_without_work_tells_nothing(missing: str) -> None:
    figures = {"depth": 2, "rank_sum": 8, "steps": 1, missing: 0}
    with pytest.raises(ValueError, match="tells nothing"):
        Observation(
            **figures, forward_seconds=1, backward_seconds=1, transferred_bytes=1, transfer_seconds=1
        ).capacity()
