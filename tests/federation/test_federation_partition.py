from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from federated_samples import labelled_set, shared, stories
from hypothesis import assume, given
from hypothesis import strategies as st

from spinecli.data.example_columns import GroupColumn
from spinecli.data.examples import Dataset, Example, load_dataset
from spinecli.errors import DataError, OptionError
from spinecli.federation.simulation.partition import (
    IID,
    ByColumn,
    Dirichlet,
    Partition,
    Shards,
    group_column,
    label_divergence,
    label_table,
    parse_partition,
    partition,
)

SCHEMES = st.one_of(
    st.just(IID()),
    st.sampled_from([1e-3, 0.05, 0.5, 1.0, 1e3]).map(Dirichlet) | st.floats(1e-3, 1e3).map(Dirichlet),
    st.integers(1, 4).map(Shards),
    st.just(ByColumn()),
)


def sizes(parts: list[list[int]]) -> list[int]:
    return [len(part) for part in parts]


@given(
    labels=st.lists(st.integers(0, 5), min_size=30, max_size=120),
    groups=st.integers(5, 40),
    devices=st.integers(1, 8),
    minimum=st.integers(1, 5),
    scheme=SCHEMES,
    seed=st.integers(0, 2**40),
)
def test_every_example_is_on_exactly_one_device_and_every_device_has_its_minimum(
    labels: list[int], groups: int, devices: int, minimum: int, scheme: Partition, seed: int
) -> None:
    dataset = labelled_set(labels, [f"g{index % groups}" for index in range(len(labels))])
    shards = devices * scheme.labels_per_device if isinstance(scheme, Shards) else 0
    if len(labels) < max(devices * minimum, shards):
        with pytest.raises(OptionError, match="fewer devices"):
            partition(dataset, devices, scheme, seed, minimum)
        return
    if isinstance(scheme, ByColumn):
        minimum = 1
        assume(min(groups, len(labels)) >= devices)
    parts = partition(dataset, devices, scheme, seed, minimum)
    assert len(parts) == devices
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    assert min(sizes(parts)) >= minimum
    assert all(type(index) is int for part in parts for index in part)
    assert partition(dataset, devices, scheme, seed, minimum) == parts


@pytest.mark.parametrize("scheme", [IID(), Dirichlet(0.5), Shards(2), ByColumn()])
def test_the_seed_decides_and_global_state_does_not(scheme: Partition) -> None:
    dataset = labelled_set([index % 4 for index in range(200)], [f"g{index % 60}" for index in range(200)])
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = partition(dataset, 10, scheme, 0)
    np.random.seed(1)
    assert partition(dataset, 10, scheme, 0) == first
    assert partition(dataset, 10, scheme, 1) != first
    np.random.seed(0)
    partition(dataset, 10, scheme, 0)
    assert (np.random.get_state()[1] == before).all()


def test_iid_gives_all_devices_equally_much() -> None:
    dataset = labelled_set([0, 1] * 51)
    assert set(sizes(partition(dataset, 10, IID(), 0))) == {10, 11}


def test_dirichlet_follows_its_proportions() -> None:
    """Against a large alpha, where proportions are equal, and in the mean over draws, where they are 1 / devices."""
    dataset = labelled_set([index % 3 for index in range(3000)])
    even = partition(dataset, 10, Dirichlet(1e6), 0)
    for part in even:
        counts = Counter(dataset.examples[index].label for index in part)
        assert all(abs(counts[label] - 100) <= 2 for label in range(3))
    drawn = np.array([sizes(partition(dataset, 4, Dirichlet(0.5), seed)) for seed in range(200)])
    # a Dirichlet(0.5) share over 4 devices has variance 0.25 * 0.75 / 3; a device's size is the sum over three labels
    deviation = math.sqrt(3 * 1000**2 * 0.25 * 0.75 / 3)
    assert np.abs(drawn.mean(axis=0) - 750).max() < 4 * deviation / math.sqrt(200)
    assert drawn.std() == pytest.approx(deviation, rel=0.15)


def test_the_smaller_alpha_the_further_devices_are_from_the_whole() -> None:
    dataset = labelled_set([index % 4 for index in range(4000)])
    found = [
        label_table(dataset, partition(dataset, 20, Dirichlet(alpha), 0), ["any"] * 20).fleet.divergence
        for alpha in (100.0, 1.0, 0.5, 0.1)
    ]
    assert all(less < more for less, more in pairwise(found))
    assert found[-1] > 0.5


def test_a_tiny_alpha_still_deals_out_everything() -> None:
    dataset = labelled_set([index % 2 for index in range(500)])
    parts = partition(dataset, 50, Dirichlet(1e-4), 0, minimum=4)
    assert min(sizes(parts)) == 4
    assert sum(sizes(parts)) == 500


@pytest.mark.parametrize("labels_per_device", [1, 2, 5])
def test_shards_are_runs_of_the_sorted_labels(labels_per_device: int) -> None:
    dataset = labelled_set([index % 10 for index in range(2000)])
    parts = partition(dataset, 20, Shards(labels_per_device), 0)
    assert set(sizes(parts)) == {100}
    for part in parts:
        counts = Counter(dataset.examples[index].label for index in part)
        # 20 devices with k shards each divide 10 labels of 200 examples exactly, so that no shard holds two labels
        assert len(counts) <= labels_per_device
        assert all(count % (100 // labels_per_device) == 0 for count in counts.values())


@given(
    members=st.lists(st.integers(1, 30), min_size=3, max_size=30),
    devices=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_groups_stay_whole_and_are_packed_evenly(members: list[int], devices: int, seed: int) -> None:
    groups = [f"g{group}" for group, count in enumerate(members) for _ in range(count)]
    parts = partition(labelled_set([0] * len(groups), groups), devices, ByColumn(), seed)
    held = [Counter(groups[index] for index in part) for part in parts]
    assert sum(map(len, held)) == len(members)
    for counts in held:
        # nobody got a further group while another device had less
        assert len(counts) == 1 or sum(counts.values()) - min(counts.values()) <= min(sizes(parts))


def test_language_groups_are_balanced_by_characters() -> None:
    lengths = [9, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    examples = tuple(Example("x" * length, group=f"g{place}") for place, length in enumerate(lengths))
    parts = partition(Dataset("language", examples, (), "made"), 2, ByColumn(), 0)
    assert sorted(sizes(parts)) == [1, 9]


def test_the_largest_group_is_not_always_on_the_first_device() -> None:
    groups = [f"g{place}" for place, count in enumerate([9, 3, 2, 1]) for _ in range(count)]
    dataset = labelled_set([0, 1, 0] * 5, groups)
    assert len({int(np.argmax(sizes(partition(dataset, 4, ByColumn(), seed)))) for seed in range(20)}) == 4


@pytest.mark.parametrize(
    ("scheme", "devices", "minimum", "words"),
    [
        (IID(), 7, 1, ["6 examples", "7 devices", "fewer devices or more data"]),
        (IID(), 3, 3, ["6 examples", "3 devices", "at least 3"]),
        (IID(), 0, 1, ["at least 1 device"]),
        (Shards(3), 3, 1, ["shards:3", "9 shards", "6 examples"]),
        (ByColumn(), 4, 1, ["3 groups", "4 devices"]),
        (ByColumn(), 3, 2, ["group 'g2'", "1 examples, fewer than 2"]),
    ],
)
def test_what_does_not_fit_is_refused(scheme: Partition, devices: int, minimum: int, words: list[str]) -> None:
    dataset = labelled_set([0, 1] * 3, ["g0", "g0", "g0", "g1", "g1", "g2"])
    with pytest.raises(OptionError) as caught:
        partition(dataset, devices, scheme, 0, minimum)
    assert all(word in str(caught.value) for word in words), caught.value


def test_data_without_labels_or_groups_is_refused_by_schemes_that_need_them() -> None:
    dataset = stories([f"story {index}" for index in range(20)])
    for scheme in (Dirichlet(0.5), Shards(2)):
        with pytest.raises(DataError, match=r"--label-column, or take --partition iid or column:NAME"):
            partition(dataset, 4, scheme, 0)
    with pytest.raises(DataError, match="column:NAME"):
        partition(dataset, 4, ByColumn(), 0)
    assert sizes(partition(dataset, 4, IID(), 0)) == [5] * 4


@given(scheme=SCHEMES | st.sampled_from([ByColumn("speaker"), ByColumn("a b")]))
def test_a_scheme_is_written_as_it_is_read(scheme: Partition) -> None:
    assert parse_partition(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "dirichlet:ALPHA"),
        ("random", "dirichlet:ALPHA"),
        ("iid:2", "dirichlet:ALPHA"),
        ("column:", "dirichlet:ALPHA"),
        ("dirichlet", "dirichlet:0.5"),
        ("dirichlet:half", "dirichlet:0.5"),
        ("dirichlet:0", "above 0"),
        ("dirichlet:nan", "above 0"),
        ("dirichlet:inf", "above 0"),
        ("shards:0", "at least 1"),
        ("shards:1.5", "shards:2"),
    ],
)
def test_schemes_that_nobody_can_mean(text: str, word: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_partition(text)
    assert word in str(caught.value)
    assert "--partition" in str(caught.value)


def test_a_scheme_says_which_column_to_read() -> None:
    assert group_column(Dirichlet(1)) is None
    assert group_column(ByColumn("speaker")) == GroupColumn("speaker")
    assert group_column(ByColumn()) == GroupColumn()


def test_the_label_table_counts_by_class_of_device() -> None:
    dataset = labelled_set([0, 0, 0, 1, 1, 1])
    table = label_table(dataset, [[0, 1], [2, 3], [4, 5]], ["TX2", "AGX", "TX2"])
    first, second = table.rows
    assert (table.labels, first.device_class, second.device_class) == (("0", "1"), "TX2", "AGX")
    assert (first.devices, first.examples, first.counts, first.labels_per_device) == (2, 4, (2, 2), 1.0)
    assert (second.devices, second.examples, second.counts, second.labels_per_device) == (1, 2, (1, 1), 2.0)
    assert (first.divergence, second.divergence) == pytest.approx((math.log(2), 0.0))
    assert (table.fleet.counts, table.fleet.divergence) == ((3, 3), pytest.approx(2 / 3 * math.log(2)))
    with pytest.raises(OptionError, match="3 devices hold data"):
        label_table(dataset, [[0], [1], [2]], ["TX2"])


@given(counts=st.lists(st.integers(0, 50), min_size=2, max_size=6), others=st.integers(0, 50))
def test_the_divergence_is_that_of_the_definition(counts: list[int], others: int) -> None:
    assume(sum(counts))
    overall = [count + others for count in counts]
    found = label_divergence(counts, overall)
    p, q = np.array(counts) / sum(counts), np.array(overall) / sum(overall)
    kept = p > 0
    assert found == pytest.approx(float((p[kept] * np.log(p[kept] / q[kept])).sum()), abs=1e-12)
    assert found >= -1e-12


def test_the_table_of_unlabelled_data_counts_examples() -> None:
    table = label_table(stories(["a", "b", "c"]), [[0, 1], [2]], ["TX2", "AGX"])
    assert [(row.examples, row.counts, row.divergence) for row in table.rows] == [(2, (), 0.0), (1, (), 0.0)]


@pytest.mark.real
def test_speakers_are_a_partition() -> None:
    path: Path = shared("datasets", "shakespeare_by_speaker")
    dataset = load_dataset(str(path), group=group_column(parse_partition("column")))
    parts = partition(dataset, 80, ByColumn(), 0)
    speakers = [example.group for part in parts for example in (dataset.examples[index] for index in part)]
    assert len(set(speakers)) == len(speakers) == 141


@pytest.mark.real
@pytest.mark.parametrize("scheme", [IID(), Dirichlet(0.5), Dirichlet(0.1), Shards(1)])
def test_a_real_set_is_dealt_out_to_a_fleet(scheme: Partition) -> None:
    dataset = load_dataset(str(shared("datasets", "sst2")))
    parts = partition(dataset, 80, scheme, 0, minimum=16)
    assert sorted(index for part in parts for index in part) == list(range(len(dataset)))
    assert min(sizes(parts)) >= 16
