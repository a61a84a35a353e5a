"""Fleets that the tests of the control module choose from."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from spinecli.federation.split.control.batches import priorities
from spinecli.federation.split.control.estimates import Pace, label_distributions, reference_distribution
from spinecli.federation.split.control.refinement import Problem
from spinecli.federation.split.control.selection.candidates import Candidates

SECONDS = st.floats(1e-6, 1e3)
PACES = st.builds(Pace, SECONDS, SECONDS, st.floats(0, 10))


def skewed_counts(devices: int, labels: int, seed: int, per_device: int = 40) -> Tensor:
    """Two shards of one label each on every device, every label on somebody, (devices, labels) int64."""
    generator = torch.Generator().manual_seed(seed)
    shards = torch.arange(2 * devices)[torch.randperm(2 * devices, generator=generator)] % labels
    counts = torch.zeros(devices, labels, dtype=torch.int64)
    half = torch.full((devices,), per_device // 2)
    for column in shards.view(devices, 2).unbind(dim=1):
        counts[torch.arange(devices), column] += half
    return counts


def skewed_candidates(
    devices: int,
    seed: int,
    budget_rows: float = math.inf,
    largest_cohort: int = 1000,
    participations: Tensor | None = None,
) -> Candidates:
    """Devices of two labels out of ten each, with batches from 1 to 32."""
    distributions = label_distributions(skewed_counts(devices, 10, seed))
    batches = torch.randint(1, 33, (devices,), generator=torch.Generator().manual_seed(seed + 1))
    taken = torch.zeros(devices, dtype=torch.int64) if participations is None else participations
    reference = reference_distribution(distributions)
    return Candidates(batches, distributions, reference, priorities(taken), budget_rows, largest_cohort)


@st.composite
def candidates(draw: st.DrawFn) -> Candidates:
    """Any devices whose smallest batch fits the budget."""
    devices, labels = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    counts = draw(_integers(0, 9, devices * labels)).view(devices, labels)
    counts[:, 0] += (counts.sum(dim=1) == 0).long()
    distributions = label_distributions(counts)
    batches = draw(_integers(1, 20, devices))
    smallest = int(batches.min())
    return Candidates(
        batches=batches,
        distributions=distributions,
        reference=reference_distribution(distributions),
        priorities=priorities(draw(_integers(0, 5, devices))),
        budget_rows=draw(st.floats(smallest, 150) | st.just(math.inf)),
        largest_cohort=draw(st.integers(1, 15)),
    )


@st.composite
def problems(draw: st.DrawFn, most_devices: int = 6) -> Problem:
    """Any batches within limits and budget; the reference has labels that the cohort may lack."""
    devices, labels = draw(st.integers(1, most_devices)), draw(st.integers(1, 4))
    counts = draw(_integers(0, 9, devices * labels)).view(devices, labels)
    counts[:, 0] += (counts.sum(dim=1) == 0).long()
    limits = draw(_integers(1, 12, devices))
    batches = draw(_integers(1, 12, devices)).minimum(limits)
    return Problem(
        batches=batches,
        distributions=label_distributions(counts),
        reference=label_distributions(draw(_integers(1, 9, labels))[None])[0],
        row_seconds=torch.tensor(draw(st.lists(SECONDS, min_size=devices, max_size=devices)), dtype=torch.float64),
        limits=limits,
        budget_rows=float(batches.sum()) + draw(st.floats(0, 20) | st.just(math.inf)),
        divergence_limit=draw(st.sampled_from([0.0, 0.01, 0.05, 0.3])),
    )


def _integers(low: int, high: int, count: int) -> st.SearchStrategy[Tensor]:
    return st.lists(st.integers(low, high), min_size=count, max_size=count).map(torch.tensor)
