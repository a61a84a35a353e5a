"""Which device holds which examples of a training set."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spinecli.data.example_columns import GroupColumn
from spinecli.data.examples import Dataset
from spinecli.errors import DataError, OptionError

_FORMS = "iid, dirichlet:ALPHA, shards:LABELS, column or column:NAME"


@dataclass(frozen=True)
class IID:
    """Every device draws from the same distribution, and all get equally much."""

    def __str__(self) -> str:
        return "iid"


@dataclass(frozen=True)
class Dirichlet:
    """Each label is spread over the devices in proportions drawn from a symmetric Dirichlet distribution."""

    alpha: float
    """Above 0; the smaller, the fewer devices hold most of a label."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise OptionError(f"--partition dirichlet:ALPHA needs a finite number above 0, not {self.alpha}.")

    def __str__(self) -> str:
        return f"dirichlet:{self.alpha!r}"


@dataclass(frozen=True)
class Shards:
    """The examples in order of their labels are cut into equal shards, of which each device gets equally many."""

    labels_per_device: int
    """Shards of a device, which is about the number of its labels."""

    def __post_init__(self) -> None:
        if self.labels_per_device < 1:
            raise OptionError(f"--partition shards:LABELS needs at least 1 label, not {self.labels_per_device}.")

    def __str__(self) -> str:
        return f"shards:{self.labels_per_device}"


@dataclass(frozen=True)
class ByColumn:
    """Examples of one group (a speaker, a user) stay together on one device."""

    column: str | None = None
    """None takes the column that is recognised by its name."""

    def __str__(self) -> str:
        return f"column:{self.column}" if self.column else "column"


Partition = IID | Dirichlet | Shards | ByColumn


def parse_partition(text: str) -> Partition:
    """The scheme that `iid`, `dirichlet:0.5`, `shards:2`, `column:speaker` or `column` names.

    `str` of a scheme is its inverse.

    Raises: OptionError.
    """
    name, colon, argument = text.strip().partition(":")
    argument = argument.strip()
    if name == "iid" and not colon:
        return IID()
    if name == "column" and bool(colon) == bool(argument):
        return ByColumn(argument or None)
    try:
        if name == "dirichlet":
            return Dirichlet(float(argument))
        if name == "shards":
            return Shards(int(argument))
    except ValueError as error:
        wanted = (
            "a number, for example dirichlet:0.5" if name == "dirichlet" else "a whole number, for example shards:2"
        )
        raise OptionError(f"--partition {text} needs {wanted}.") from error
    raise OptionError(f"--partition {text} is not one of {_FORMS}.")


def group_column(scheme: Partition) -> GroupColumn | None:
    """Where examples say whose they are, if the scheme deals by groups."""
    return GroupColumn(scheme.column) if isinstance(scheme, ByColumn) else None


# keeps this draw apart from others of the same seed
_STREAM = 2

Parts = list[list[int]]


def partition(dataset: Dataset, devices: int, scheme: Partition, seed: int, minimum: int = 1) -> Parts:
    """Indices of the examples of each device, ascending; every example is on exactly one device.

    Args:
        devices: how many there are, at least 1.
        minimum: examples that every device gets at the least. Where a scheme gives a device fewer, examples drawn at
            random from the then largest device are moved to it; groups are never split for that.

    Raises: OptionError if the scheme does not go with the number of devices or with the minimum, DataError if the
        examples lack the labels or groups that the scheme deals by.
    """
    if devices < 1 or minimum < 1:
        raise OptionError(f"There must be at least 1 device and 1 example on each, not {devices} and {minimum}.")
    if len(dataset) < devices * minimum:
        raise OptionError(
            f"{dataset.reference} has {len(dataset)} examples to train on, too few for {devices} devices with at least "
            f"{minimum} each; take fewer devices or more data."
        )
    generator = np.random.default_rng((seed, _STREAM))
    if isinstance(scheme, ByColumn):
        parts = _by_group(dataset, devices, generator)
        _refuse_small(dataset, parts, minimum)
    else:
        if isinstance(scheme, IID):
            parts = _deal_evenly(dataset, devices, generator)
        elif isinstance(scheme, Dirichlet):
            parts = _by_proportions(dataset, devices, scheme, generator)
        else:
            parts = _by_shards(dataset, devices, scheme, generator)
        _fill_up(parts, minimum, generator)
    return [sorted(part) for part in parts]


def _deal_evenly(dataset: Dataset, devices: int, generator: np.random.Generator) -> Parts:
    return [part.tolist() for part in np.array_split(generator.permutation(len(dataset)), devices)]


def _by_proportions(dataset: Dataset, devices: int, scheme: Dirichlet, generator: np.random.Generator) -> Parts:
    """For each label, p ~ Dirichlet(alpha, ..., alpha) over the devices, which get about p times its examples."""
    labels = _labels(dataset, scheme)
    parts: Parts = [[] for _ in range(devices)]
    for label in np.unique(labels):
        pool = generator.permutation(np.flatnonzero(labels == label))
        proportions = generator.dirichlet(np.full(devices, scheme.alpha))
        # cuts at the rounded running sums, so that rounding loses no example
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(pool)).astype(np.int64)
        for part, share in zip(parts, np.split(pool, cuts), strict=True):
            part.extend(share.tolist())
    return parts


def _by_shards(dataset: Dataset, devices: int, scheme: Shards, generator: np.random.Generator) -> Parts:
    labels = _labels(dataset, scheme)
    count = devices * scheme.labels_per_device
    if count > len(dataset):
        raise OptionError(
            f"--partition {scheme} needs {count} shards for {devices} devices, but {dataset.reference} has only "
            f"{len(dataset)} examples to train on; take fewer devices or fewer labels each."
        )
    shuffled = generator.permutation(len(dataset))
    shards = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], count)
    hands = np.array_split(generator.permutation(count), devices)
    return [[index for shard in hand for index in shards[shard].tolist()] for hand in hands]


def _by_group(dataset: Dataset, devices: int, generator: np.random.Generator) -> Parts:
    """The largest group left goes to the device that has least, until none is left."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(dataset.examples):
        if example.group is None:
            raise DataError(f"{dataset.reference} was read without a group column; name it as --partition column:NAME.")
        groups.setdefault(example.group, []).append(index)
    if len(groups) < devices:
        raise OptionError(
            f"{dataset.reference} has {len(groups)} groups to train on, fewer than the {devices} devices; "
            "take fewer devices, or another partition."
        )
    sizes = {name: sum(_size(dataset, index) for index in members) for name, members in groups.items()}
    # ties and the devices' order are drawn, or the first class of devices would always hold the largest groups
    names = sorted(groups)
    order = sorted((names[i] for i in generator.permutation(len(names))), key=lambda name: -sizes[name])
    parts: Parts = [[] for _ in range(devices)]
    heap = [(0, place, int(device)) for place, device in enumerate(generator.permutation(devices))]
    heapq.heapify(heap)
    for name in order:
        filled, place, device = heapq.heappop(heap)
        parts[device].extend(groups[name])
        heapq.heappush(heap, (filled + sizes[name], place, device))
    return parts


def _size(dataset: Dataset, index: int) -> int:
    """What an example weighs when groups are balanced: one, or its characters where the text itself is learned."""
    if dataset.task == "classification":
        return 1
    example = dataset.examples[index]
    said = example.text if not example.conversation else "".join(turn.content for turn in example.conversation)
    return len(said) + len(example.answer or "")


def _labels(dataset: Dataset, scheme: Dirichlet | Shards) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    labels = [example.label for example in dataset.examples if example.label is not None]
    if len(labels) < len(dataset):
        raise DataError(
            f"--partition {scheme} partitions by label, and {dataset.reference} has none; "
            "name a column with --label-column, or take --partition iid or column:NAME."
        )
    return np.array(labels, dtype=np.int64)


def _refuse_small(dataset: Dataset, parts: Sequence[Sequence[int]], minimum: int) -> None:
    smallest = min(parts, key=len)
    if len(smallest) < minimum:
        group = dataset.examples[smallest[0]].group
        raise OptionError(
            f"The device that holds group {group!r} has {len(smallest)} examples, fewer than {minimum}; take fewer "
            "devices so that groups are put together, or a smaller minimum."
        )


def _fill_up(parts: Parts, minimum: int, generator: np.random.Generator) -> None:
    """Moves examples from the largest devices until every device has `minimum`."""
    heap = [(-len(part), device) for device, part in enumerate(parts)]
    heapq.heapify(heap)
    for part in parts:
        while len(part) < minimum:
            # whoever was filled up has an outdated entry, but one too small to be asked while others have more
            _, donor = heapq.heappop(heap)
            given = parts[donor]
            part.append(given.pop(int(generator.integers(len(given)))))
            heapq.heappush(heap, (-len(given), donor))


@dataclass(frozen=True)
class LabelRow:
    """All devices of one class."""

    device_class: str
    devices: int
    examples: int
    counts: tuple[int, ...]
    """Examples of each label, in the order of the table's labels."""
    labels_per_device: float
    """Mean number of labels that a device has; 0 if the examples have no labels."""
    divergence: float
    """Mean over the devices of KL(device's labels || all labels), in nats; 0 if the examples have no labels."""


@dataclass(frozen=True)
class LabelTable:
    """One row for each class of device, in order of first occurrence, and one for the fleet."""

    labels: tuple[str, ...]
    rows: tuple[LabelRow, ...]
    fleet: LabelRow


def label_table(dataset: Dataset, parts: Sequence[Sequence[int]], device_classes: Sequence[str]) -> LabelTable:
    """Counts of labels where the devices' parts lie.

    Args:
        parts: indices of the examples of each device.
        device_classes: the class of each device, as many as `parts`.

    Raises: OptionError if there are not as many classes as parts.
    """
    if len(parts) != len(device_classes):
        raise OptionError(
            f"{len(parts)} devices hold data, but the fleet has {len(device_classes)}; partition it again."
        )
    counts = [_counts(dataset, part) for part in parts]
    overall = _summed(counts, len(dataset.labels))
    divergences = [label_divergence(one, overall) for one in counts]

    def row(name: str, members: Sequence[int]) -> LabelRow:
        return LabelRow(
            device_class=name,
            devices=len(members),
            examples=sum(len(parts[device]) for device in members),
            counts=_summed([counts[device] for device in members], len(dataset.labels)),
            labels_per_device=_mean([sum(count > 0 for count in counts[device]) for device in members]),
            divergence=_mean([divergences[device] for device in members]),
        )

    by_class: dict[str, list[int]] = {}
    for device, name in enumerate(device_classes):
        by_class.setdefault(name, []).append(device)
    rows = tuple(row(name, members) for name, members in by_class.items())
    return LabelTable(dataset.labels, rows, row("fleet", range(len(parts))))


def label_divergence(counts: Sequence[int], overall: Sequence[int]) -> float:
    """KL(p || q) in nats, of the distribution p of `counts` from q of `overall`; 0 log 0 is 0.

    `overall` must count whatever `counts` counts, so that the divergence is finite.
    """
    own, whole = sum(counts), sum(overall)
    return math.fsum(
        count / own * math.log(count / own * whole / total)
        for count, total in zip(counts, overall, strict=True)
        if count
    )


def _counts(dataset: Dataset, part: Sequence[int]) -> tuple[int, ...]:
    counts = [0] * len(dataset.labels)
    for index in part:
        if (label := dataset.examples[index].label) is not None:
            counts[label] += 1
    return tuple(counts)


def _summed(counts: Sequence[Sequence[int]], labels: int) -> tuple[int, ...]:
    return tuple(sum(one[label] for one in counts) for label in range(labels))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
