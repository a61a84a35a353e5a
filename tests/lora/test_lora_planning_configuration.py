from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spinecli.lora.planning.capacity import Capacities
from spinecli.lora.planning.configuration import Configuration, Goals, Window, configure, deadlines, depths_under
from spinecli.lora.planning.ranks import CostTable, completion_table, rank_distribution

BLOCK_BYTES, WEIGHT_BYTES = 10.0, 100.0


@dataclass(frozen=True, eq=False)
class Fleet:
    """Devices whose costs follow the completion-time model, and the memory that each has."""

    capacities: Capacities
    memory: Tensor
    blocks: int
    steps: int = 2

    def predict(self, ranks: Tensor) -> CostTable:
        needed = WEIGHT_BYTES + BLOCK_BYTES * torch.arange(1, self.blocks + 1)
        return completion_table(self.capacities, ranks, self.steps, needed)

    def configure(self, ranks: Tensor, goals: Goals, previous: Tensor | None = None) -> Configuration:
        return configure(self.predict, ranks, self.memory, goals, previous)


def fleet(devices: int, blocks: int, spread: float, seed: int, scarce: bool = False) -> Fleet:
    """Speeds log-uniform over `spread`; with `scarce`, some devices hold few blocks or none."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return torch.rand(devices, generator=generator, dtype=torch.float64)

    slowness = spread ** drawn()
    depths = (drawn() * (blocks + 2)).floor() if scarce else torch.full((devices,), float(blocks))
    capacities = Capacities(
        forward_seconds=slowness,
        block_seconds=slowness / blocks,
        rank_seconds=0.01 * drawn(),
        rank_bytes=torch.full((devices,), 64.0, dtype=torch.float64),
        latency_seconds=0.1 * drawn(),
    )
    return Fleet(capacities, WEIGHT_BYTES + BLOCK_BYTES * depths, blocks)


FLEETS = st.builds(
    fleet, st.integers(1, 12), st.integers(1, 8), st.sampled_from([1.0, 2.0, 4.0, 16.0]), st.integers(0, 10**6)
)
SCARCE = st.builds(
    fleet,
    st.integers(2, 12),
    st.integers(1, 8),
    st.sampled_from([1.0, 4.0]),
    st.integers(0, 10**6),
    scarce=st.just(True),
)
GOALS = st.builds(Goals, st.sampled_from([0.05, 0.2, 1.0]), st.sampled_from([0.1, 0.5, 1.0]))


def ranks_for(made: Fleet) -> Tensor:
    return rank_distribution(made.blocks, 4 * made.blocks)


@given(FLEETS, GOALS)
def test_every_device_meets_the_deadline_as_deep_as_it_can(made: Fleet, goals: Goals) -> None:
    ranks = ranks_for(made)
    found = made.configure(ranks, goals)
    seconds = made.predict(ranks).seconds
    assert float(found.seconds.max()) == found.deadline
    for device, depth in enumerate(found.depths.tolist()):
        assert 1 <= depth <= made.blocks
        assert float(seconds[device, depth - 1]) == float(found.seconds[device]) <= found.deadline
        if depth < made.blocks:
            assert float(seconds[device, depth]) > found.deadline


@given(SCARCE, GOALS, st.integers(1, 3))
def test_memory_is_never_exceeded_and_who_holds_too_little_is_left_out(
    made: Fleet, goals: Goals, min_depth: int
) -> None:
    goals = replace(goals, min_depth=min(min_depth, made.blocks))
    needed = made.predict(ranks_for(made)).memory_bytes
    able = needed[:, goals.min_depth - 1] <= made.memory
    found = made.configure(ranks_for(made), goals)
    assert torch.equal(found.depths > 0, able)
    assert found.excluded.tolist() == (~able).nonzero()[:, 0].tolist()
    if not able.any():
        assert found.deadline == found.traffic_bytes == 0
        return
    for device in able.nonzero()[:, 0].tolist():
        depth = int(found.depths[device])
        assert depth >= goals.min_depth
        assert float(needed[device, depth - 1]) <= float(made.memory[device])
    taking_part = found.seconds[able]
    assert found.waiting == pytest.approx(float(1 - taking_part.mean() / taking_part.max()), abs=1e-9)


@given(FLEETS, st.sampled_from([1.0, 2.5, 12.0]), st.data())
def test_the_running_sums_say_what_each_deadline_means(made: Fleet, enough: float, data: st.DataObject) -> None:
    ranks, table = ranks_for(made), made.predict(ranks_for(made))
    devices = len(made.memory)
    least = torch.tensor(data.draw(st.lists(st.integers(1, made.blocks), min_size=devices, max_size=devices)))
    most = torch.tensor([data.draw(st.integers(depth, made.blocks)) for depth in least.tolist()])
    window = Window(least, most)
    grid = deadlines(table, window, ranks.double(), enough)
    reachable = {float(table.seconds[d, k - 1]) for d in range(devices) for k in range(least[d], most[d] + 1)}
    floor = max(float(table.seconds[d, least[d] - 1]) for d in range(devices))
    assert grid.seconds.tolist() == sorted(t for t in reachable if t >= floor)
    for index, deadline in enumerate(grid.seconds):
        depths = depths_under(deadline, table, window)
        seconds = table.at(table.seconds, depths)
        assert float(seconds.max()) == float(deadline)
        assert float(grid.waiting[index]) == pytest.approx(float((deadline - seconds).mean() / deadline), abs=1e-9)
        assert float(grid.traffic_bytes[index]) == pytest.approx(float(table.at(table.traffic_bytes, depths).sum()))
        holders = torch.tensor([float((depths >= made.blocks - block).sum()) for block in range(made.blocks)])
        utility = float((ranks * (holders / enough).clamp(max=1)).sum())
        assert float(grid.utility[index]) == pytest.approx(utility)


@given(FLEETS, GOALS)
def test_the_best_deadline_that_keeps_the_goal_is_taken(made: Fleet, goals: Goals) -> None:
    ranks = ranks_for(made)
    found = made.configure(ranks, goals)
    table = made.predict(ranks)
    devices = len(made.memory)
    window = Window(torch.ones(devices, dtype=torch.int64), torch.full((devices,), made.blocks))
    grid = deadlines(table, window, ranks.double(), max(1.0, goals.coverage * devices))
    patient = grid.waiting <= goals.max_waiting + 1e-9
    assert found.meets_waiting == bool(patient.any())
    if found.meets_waiting:
        assert found.waiting <= goals.max_waiting + 1e-9
        best = float((grid.utility / grid.seconds)[patient].max())
        assert found.utility / found.deadline == pytest.approx(best)
    else:
        assert found.waiting == pytest.approx(float(grid.waiting.min()), abs=1e-9)


@pytest.mark.parametrize("spread", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_devices_wait_less_than_under_uniform_depth(spread: float, seed: int) -> None:
    made = fleet(80, 12, spread, seed)
    uniform = made.predict(ranks_for(made)).seconds[:, -1]
    idle = 1 - float(uniform.mean() / uniform.max())
    found = made.configure(ranks_for(made), Goals(max_waiting=0.25, coverage=0.5))
    assert found.meets_waiting
    assert found.waiting < 0.5 * idle
    assert found.deadline < float(uniform.max())


@given(FLEETS, st.floats(0.02, 1.2))
def test_traffic_stays_in_its_budget_or_the_plan_says_that_it_cannot(made: Fleet, share: float) -> None:
    ranks = ranks_for(made)
    free = made.configure(ranks, Goals(1.0, 0.5))
    budget = share * free.traffic_bytes
    found = made.configure(ranks, Goals(1.0, 0.5, traffic_budget=budget))
    sent = made.predict(found.ranks)
    assert found.traffic_bytes == pytest.approx(float(sent.at(sent.traffic_bytes, found.depths).sum()))
    assert found.meets_traffic == (found.traffic_bytes <= budget)
    assert bool((found.ranks <= ranks).all())
    if share >= 1:
        assert torch.equal(found.ranks, ranks)
    if not found.meets_traffic:
        assert found.ranks.tolist() == [1] * made.blocks
        assert found.depths.tolist() == [1] * len(made.memory)


def test_a_budget_that_only_shallower_plans_keep_is_kept() -> None:
    made = fleet(8, 6, 2.0, seed=1)
    ones = torch.ones(6, dtype=torch.int64)
    free = made.configure(ones, Goals(1.0, 1.0))
    found = made.configure(ones, Goals(1.0, 1.0, traffic_budget=0.7 * free.traffic_bytes))
    assert found.meets_traffic
    assert int(found.depths.sum()) < int(free.depths.sum())


@given(SCARCE, GOALS, st.data())
def test_depths_move_by_two_blocks_a_round_unless_memory_forces_more(
    made: Fleet, goals: Goals, data: st.DataObject
) -> None:
    devices = len(made.memory)
    previous = torch.tensor(data.draw(st.lists(st.integers(0, made.blocks), min_size=devices, max_size=devices)))
    fits = (made.predict(ranks_for(made)).memory_bytes <= made.memory[:, None]).sum(dim=1)
    found = made.configure(ranks_for(made), goals, previous)
    for before, now, most in zip(previous.tolist(), found.depths.tolist(), fits.tolist(), strict=True):
        assert now <= most
        if before and most and now != most:
            assert abs(now - before) <= 2
        if before and most >= before - 2 and now:
            assert abs(now - before) <= 2


def test_repeated_rounds_reach_the_plan_of_a_first_round() -> None:
    made = fleet(20, 12, 3.0, seed=4)
    goals = Goals(max_waiting=1.0, coverage=0.5)
    direct = made.configure(ranks_for(made), goals)
    depths = torch.full((20,), 12)
    for _ in range(8):
        depths = made.configure(ranks_for(made), goals, depths).depths
    assert torch.equal(depths, direct.depths)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -1.0, 0.0])
def test_costs_that_cannot_be_are_refused(broken: float) -> None:
    made = fleet(3, 4, 2.0, seed=0)

    def predict(ranks: Tensor) -> CostTable:
        table = made.predict(ranks)
        seconds = table.seconds.clone()
        seconds[1, 2:] = broken
        return replace(table, seconds=seconds)

    with pytest.raises(ValueError, match="predicted costs"):
        configure(predict, ranks_for(made), made.memory, Goals(0.2, 0.5))


def test_eight_thousand_devices_are_planned_in_two_seconds() -> None:
    made = fleet(8000, 32, 4.0, seed=0, scarce=True)
    began = time.perf_counter()
    found = made.configure(ranks_for(made), Goals(0.2, 0.5))
    assert time.perf_counter() - began < 2
    assert len(found.depths) == 8000
