from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import HIDDEN
from small_federations import FAST, SLOW, Watched, adapter_digest
from sums import digest
from torch import Tensor

from spinecli.errors import OptionError
from spinecli.federation.engine import Node
from spinecli.federation.history import History, load_state
from spinecli.federation.run import set_up
from spinecli.federation.strategies import STRATEGIES, strategy_of
from spinecli.federation.strategies.fedspine import allowed_ranks
from spinecli.federation.strategies.hetlora import ranks_by_memory
from spinecli.federation.strategies.strategy import ClientUpdate
from spinecli.lora.factors import Adapter, Factors
from spinecli.lora.planning.ranks import rank_distribution

PRUNING = ("fed-loraprune", "fedspine", "fedspine-model")


def mean_products(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """sum |D_i| B_i A_i / sum |D_i|, dense, in float64."""
    total = sum(update.weight for update in updates)
    names = updates[0].contribution.adapter
    return {
        name: sum(
            (
                update.weight / total * each.b.double() @ each.a.double()
                for update in updates
                for each in [update.contribution.adapter[name]]
            ),
            torch.zeros(()),
        )
        for name in names
    }


def assert_products(adapter: Adapter, expected: dict[str, Tensor]) -> None:
    assert adapter.keys() == expected.keys()
    for name, factors in adapter.items():
        found = factors.b.double() @ factors.a.double()
        assert float(expected[name].norm()) > 1e-3, "the devices have trained"
        assert float((found - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()), name


EXACT: dict[str, dict[str, Any]] = {
    "ffa-lora": {},
    "flexlora": {"smallest_rank": HIDDEN, "largest_rank": HIDDEN},
    "flora": {"smallest_rank": 4, "largest_rank": 4},
    "fedspine": {"smallest_rank": HIDDEN, "largest_rank": HIDDEN, "sparsity": 0.0},
    "fedspine-model": {"smallest_rank": HIDDEN, "largest_rank": HIDDEN, "sparsity": 0.0},
}


@pytest.mark.parametrize(("strategy", "changes"), EXACT.items(), ids=EXACT.keys())
def test_equal_ranks_and_masks_give_the_weighted_mean_of_the_products(
    requests: Any, strategy: str, changes: dict[str, Any]
) -> None:
    """At a rank that holds every product, no approximation is in between."""
    watched = Watched(requests(strategy=strategy, cohort=5, partition="dirichlet:1", **changes))
    watched.go_on(1)
    updates = watched.updates[0]
    assert len({update.weight for update in updates}) > 1
    assert len({update.ranks for update in updates}) == 1
    assert_products(watched.adapter, mean_products(updates))


@pytest.mark.parametrize("strategy", ["flexlora", "fedspine"])
def test_answers_can_count_alike_whatever_the_devices_hold(requests: Any, strategy: str) -> None:
    watched = Watched(
        requests(strategy=strategy, cohort=5, partition="dirichlet:1", weighting="equal", **EXACT[strategy])
    )
    watched.go_on(1)
    updates = watched.updates[0]
    assert {update.weight for update in updates} == {1.0}
    assert_products(watched.adapter, mean_products(updates))
    for name, value in watched.federation.strategy.model().head.items():
        heads = [update.head[name].double() for update in updates]
        assert torch.allclose(value.double(), sum(heads) / len(heads), atol=1e-6), name


def test_fedit_is_exact_where_all_devices_have_the_same_a(requests: Any) -> None:
    watched = Watched(requests(strategy="fedit", cohort=5, partition="dirichlet:1"))
    watched.go_on(1)
    updates = watched.updates[0]
    shared = updates[0].contribution.adapter
    alike = [
        replace(
            update,
            contribution=replace(
                update.contribution,
                adapter={name: Factors(shared[name].a, each.b) for name, each in update.contribution.adapter.items()},
            ),
        )
        for update in updates
    ]
    watched.federation.strategy.aggregate_train(1, alike, [])
    assert_products(watched.adapter, mean_products(alike))
    watched.federation.strategy.aggregate_train(2, updates, [])
    with pytest.raises(AssertionError):  # as they were, the mean of A and of B is not the mean of the products
        assert_products(watched.adapter, mean_products(updates))


def test_flora_is_exact_at_any_ranks_round_after_round(requests: Any) -> None:
    watched = Watched(requests(strategy="flora", cohort=5, smallest_rank=2, largest_rank=6))
    watched.go_on(3)
    expected = mean_products(watched.updates[0])
    for updates in watched.updates[1:]:
        assert {update.ranks[0] for update in updates} == {2, 6}
        for name, product in mean_products(updates).items():
            expected[name] = expected[name] + product
    assert_products(watched.adapter, expected)
    assert any(each.rank == HIDDEN for each in watched.adapter.values()), "what has grown too long is compressed"


def test_flora_starts_every_round_from_the_folded_model(requests: Any) -> None:
    """What a device trains on is the base with everything so far, and fresh factors that change nothing yet."""
    watched = Watched(requests(strategy="flora", cohort=5))
    watched.go_on(2)
    first, second = watched.assignments
    for assignment in first.values():
        assert not assignment.folded
    for assignment in second.values():
        assert assignment.folded.keys() == assignment.adapter.keys()
        assert not any(bool(factors.b.any()) for factors in assignment.adapter.values())
    names = list(first)
    assert not torch.equal(
        *(each[names[0]].adapter[next(iter(second[names[0]].adapter))].a for each in (first, second))
    )


def test_ffa_never_moves_a_and_sends_b_alone(requests: Any) -> None:
    watched = Watched(requests(strategy="ffa-lora"))
    start = {name: factors.a for name, factors in watched.adapter.items()}
    records = watched.go_on(3)
    assert all(torch.equal(watched.adapter[name].a, a) for name, a in start.items())
    whole = Watched(requests(strategy="fedit")).go_on(1)[0]
    assert records[0].bytes < 0.75 * whole.bytes


def test_ranks_follow_memory() -> None:
    nodes = [Node(name, "any", memory, 1) for name, memory in (("a", 4), ("b", 1), ("c", 9), ("d", 1))]
    assert ranks_by_memory(nodes, 4, 32) == {"a": 18, "b": 4, "c": 32, "d": 4}
    assert ranks_by_memory(nodes[1::2], 4, 32) == {"b": 18, "d": 18}


@pytest.mark.parametrize("strategy", ["hetlora", "flexlora", "flora"])
def test_each_device_trains_at_its_own_rank(requests: Any, strategy: str) -> None:
    watched = Watched(requests(strategy=strategy, cohort=5, smallest_rank=2, largest_rank=6))
    watched.go_on(1)
    for device, assignment in watched.assignments[0].items():
        assert set(assignment.ranks) == {2 if device.startswith("slow") else 6}


def legend(requests: Any, **changes: Any) -> Watched:
    return Watched(requests(strategy="legend", cohort=SLOW + FAST, **changes))


def memory_between(requests: Any, depth: int) -> float:
    """Gigabytes that hold training at a depth and not one deeper; depth 0: none at all."""
    strategy: Any = legend(requests).federation.strategy
    bytes_by_depth = [0.0, *strategy._memory_by_depth().tolist()]
    return (bytes_by_depth[depth] + bytes_by_depth[depth + 1]) / 2e9


def test_blocks_that_nobody_can_hold_stay_as_they_were(requests: Any) -> None:
    """One class holds two blocks, the other one; the lowest block is out of reach."""
    fleet = {"slow_gb": memory_between(requests, 1), "fast_gb": memory_between(requests, 2)}
    watched = legend(requests, fleet=fleet)
    before = {name: (factors.a.clone(), factors.b.clone()) for name, factors in watched.adapter.items()}
    records = watched.go_on(3)
    blocks = watched.federation.setting.blocks
    depths = {device.device: device.depth for record in records for device in record.devices}
    assert set(depths.values()) == {1, 2}
    projections = watched.federation.setting.projections
    for name, (a, b) in before.items():
        factors = watched.adapter[name]
        unchanged = torch.equal(factors.a, a) and torch.equal(factors.b, b)
        assert unchanged == (projections[name].block < blocks - 2), name


def test_legend_shares_ranks_and_averages_each_block_over_its_holders(requests: Any) -> None:
    fleet = {"slow_gb": memory_between(requests, 1)}
    watched = legend(requests, fleet=fleet)
    watched.go_on(1)
    shared = rank_distribution(watched.federation.setting.blocks, 4 * watched.federation.setting.blocks).tolist()
    assert shared == sorted(shared)
    assert shared[0] < shared[-1]
    for assignment in watched.assignments[0].values():
        held = [rank for rank in assignment.ranks if rank]
        assert list(assignment.ranks) == [0] * (len(shared) - len(held)) + shared[len(shared) - len(held) :]
    projections = watched.federation.setting.projections
    for name, factors in watched.adapter.items():
        holders = [update for update in watched.updates[0] if name in update.contribution.adapter]
        block = projections[name].block
        assert len(holders) == (FAST + SLOW if block == len(shared) - 1 else FAST)
        total = sum(update.weight for update in holders)
        for side in ("a", "b"):
            mean = sum(
                update.weight / total * getattr(update.contribution.adapter[name], side).double() for update in holders
            )
            torch.testing.assert_close(getattr(factors, side).double(), mean, rtol=1e-5, atol=1e-7)


def test_a_device_that_holds_no_block_sits_out(requests: Any) -> None:
    watched = legend(requests, fleet={"slow_gb": memory_between(requests, 0)})
    for record in watched.go_on(3):
        assert {device.device for device in record.devices} == {"fast-00", "fast-01"}


def test_a_cohort_that_holds_nothing_makes_an_empty_round_and_the_run_goes_on(requests: Any) -> None:
    memory = memory_between(requests, 0)
    records = Watched(requests(strategy="legend", cohort=2, fleet={"slow_gb": memory})).go_on(12, evaluate_every=12)
    empty = [record for record in records if not record.devices]
    assert empty, "of twelve cohorts of two, one is of slow devices only"
    assert all(record.seconds == 0 and record.idle_share == 0 and record.slowest is None for record in empty)
    assert records[-1].ended > 0


def test_ranks_that_a_traffic_goal_lowers_stay_lowered_also_when_resumed(requests: Any) -> None:
    watched, other = (legend(requests, rounds=3) for _ in range(2))
    strategy: Any = watched.federation.strategy
    watched.go_on(1)
    uniform = sum(device.bytes_down + device.bytes_up for device in watched.history.rounds[0].devices)
    strategy.goals = replace(strategy.goals, traffic_budget=uniform * 0.4)
    before = strategy.ranks.tolist()
    record = watched.go_on(2)[0]
    lowered = strategy.ranks.tolist()
    assert sum(lowered) < sum(before)
    assert record.bytes < uniform
    for assignment in watched.assignments[1].values():
        assert all(rank in (0, most) for rank, most in zip(assignment.ranks, lowered, strict=True))
    restored: Any = other.federation.strategy
    restored.restore(strategy.snapshot())
    assert restored.ranks.tolist() == lowered
    assert adapter_digest(other.adapter) == adapter_digest(watched.adapter)


def test_a_device_that_was_never_seen_gets_the_smallest_rank(requests: Any) -> None:
    watched = Watched(requests(strategy="fedspine-model", cohort=2, rounds=6, sparsity=0.0))
    seen: set[str] = set()
    for number in range(6):
        watched.go_on(number + 1)
        fresh = [set(each.ranks) for device, each in watched.assignments[number].items() if device not in seen]
        assert all(ranks == {2} for ranks in fresh)
        seen |= watched.assignments[number].keys()
    assert any(max(each.ranks) > 2 for assigned in watched.assignments for each in assigned.values())


@pytest.mark.parametrize("targets", ["query-value", "mlp.down_proj"])
def test_the_factors_score_needs_factors_on_both_groups(requests: Any, targets: str) -> None:
    with pytest.raises(OptionError, match="--targets all, or --score salience"):
        set_up(requests(strategy="fedspine", targets=targets))
    set_up(requests(strategy="fedspine", targets=targets, score="salience"))


@pytest.mark.parametrize("strategy", PRUNING)
def test_every_device_is_pruned_step_by_step_to_the_target_and_no_further(requests: Any, strategy: str) -> None:
    watched = Watched(requests(strategy=strategy, rounds=10, sparsity=0.4, cohort=4))
    setting = watched.federation.setting
    cuts = setting.cuts
    records = watched.go_on(10, evaluate_every=5)
    target = cuts.ratio_of(cuts.widths_at(0.4))
    assert abs(target - 0.4) <= 0.5 * cuts.costs.channel / cuts.costs.block
    stand: dict[str, list[float]] = {}
    for record in records:
        for device in record.devices:
            stand.setdefault(device.device, [0.0]).append(device.ratio)
            if record.round >= 7:
                assert device.ratio == pytest.approx(target, abs=cuts.costs.channel / cuts.costs.block)
    assert len(stand) == SLOW + FAST
    for ratios in stand.values():
        assert all(before <= after for before, after in pairwise(ratios))
        assert max(ratios) <= target + cuts.costs.channel / cuts.costs.block
        assert len(set(ratios)) > 2, "not in one jump"
    for served in watched.federation.strategy.model().served:
        assert served.ratio == pytest.approx(target, abs=cuts.costs.channel / cuts.costs.block)
        assert served.masks is not None
        assert served.devices == (SLOW if served.group == "slow" else FAST)


def test_devices_of_the_improved_strategy_start_from_the_importance_of_the_fleet(requests: Any) -> None:
    watched = Watched(requests(strategy="fedspine-model", rounds=4, cohort=4))
    watched.go_on(3)
    first, second, _ = ([each.pruning for each in assigned.values()] for assigned in watched.assignments)
    assert all(order is not None and order.importance is None for order in first)
    reported = {SLOW: "slow", FAST: "fast"}
    sent = [order.importance for order in second if order is not None and order.importance is not None]
    assert len(sent) == len(second)
    reports: dict[str, Tensor] = {}
    for update in watched.updates[0]:
        assert update.importance is not None
        name = watched.federation.strategy.class_of[update.device]  # type: ignore[attr-defined]
        heads = update.importance[0].heads
        reports[name] = heads if name not in reports else 0.8 * reports[name] + 0.2 * heads
    expected = sum(share * reports[name] for share, name in reported.items() if name in reports)
    expected = expected / sum(share for share, name in reported.items() if name in reports)
    for importance in sent:
        assert torch.allclose(importance[0].heads, torch.as_tensor(expected))


@pytest.mark.parametrize("strategy", ["fed-loraprune", "fedspine"])
def test_other_pruning_strategies_leave_a_device_its_own_importance(requests: Any, strategy: str) -> None:
    watched = Watched(requests(strategy=strategy, rounds=4, cohort=4))
    watched.go_on(3)
    orders = [each.pruning for assigned in watched.assignments for each in assigned.values()]
    assert all(order is not None and order.importance is None for order in orders)


@pytest.mark.parametrize("strategy", ["fedspine", "fedspine-model"])
def test_ranks_stay_within_the_users_limits(requests: Any, strategy: str) -> None:
    watched = Watched(requests(strategy=strategy, rounds=6, smallest_rank=3, largest_rank=9))
    watched.go_on(6)
    ranks = {rank for assignments in watched.assignments for each in assignments.values() for rank in each.ranks}
    assert ranks <= set(allowed_ranks(3, 9)) == {3, 4, 8, 9}
    assert len(ranks) > 1
    assert {each.rank for each in watched.adapter.values()} == {9}


def test_one_allowed_rank_is_one() -> None:
    assert allowed_ranks(5, 5) == (5,)
    assert allowed_ranks(4, 32) == (4, 8, 12, 16, 24, 32)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_restored_run_goes_on_with_the_same_bytes(requests: Any, tmp_path: Path, strategy: str) -> None:
    """Through the file that a killed run leaves, with devices failing and late on the way."""
    request = requests(strategy=strategy, rounds=6, fleet={"dropout": 0.2})
    whole, resumed = Watched(request), Watched(request)
    whole.go_on(3)
    whole.states[-1].save(tmp_path)
    state = load_state(tmp_path)
    assert state is not None
    resumed.federation.strategy.restore(state.strategy)
    resumed.federation.engine.restore(state.engine)
    resumed.history = History(None, whole.history.rounds)
    assert whole.go_on(6) == resumed.go_on(6)
    one, other = (each.federation.strategy.model() for each in (whole, resumed))
    assert adapter_digest(one.adapter) == adapter_digest(other.adapter)
    assert digest(dict(one.head)) == digest(dict(other.head))
    states = [each.states[-1] for each in (whole, resumed)]
    assert states[0].strategy.values == states[1].strategy.values
    for name in ("strategy", "engine"):
        tensors = [dict(getattr(state, name).tensors) for state in states]
        assert digest(tensors[0]) == digest(tensors[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_starts_from_a_model_that_changes_nothing(requests: Any, strategy: str) -> None:
    watched = Watched(requests(strategy=strategy))
    model = watched.federation.strategy.model()
    assert not any(bool(factors.product().any()) for factors in model.adapter.values())
    assert digest(dict(model.head)) == digest(watched.federation.base.head())
    assert sum(served.devices for served in model.served) == SLOW + FAST
    assert all(served.masks is None and served.ratio == 0 for served in model.served)


def test_the_improved_planner_makes_devices_wait_less_than_equal_work(requests: Any) -> None:
    changes: dict[str, Any] = {"rounds": 8, "cohort": 5, "smallest_rank": 2, "largest_rank": 12}
    idle = {}
    for strategy in ("fed-loraprune", "fedspine-model"):
        records = Watched(requests(strategy=strategy, **changes)).go_on(8, evaluate_every=8)
        idle[strategy] = sum(record.idle_share for record in records[4:])
    assert idle["fedspine-model"] < idle["fed-loraprune"]


def test_a_strategy_that_there_is_not_is_refused_with_the_list() -> None:
    with pytest.raises(OptionError, match=r"fedsprout.*fedit, hetlora"):
        strategy_of("fedsprout")
