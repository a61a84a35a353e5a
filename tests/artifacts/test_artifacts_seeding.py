from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from spinecli.artifacts.seeding import derived_seed, random_generator, torch_generator

PURPOSES = st.lists(st.text(max_size=6) | st.integers(0, 99), max_size=3)


def test_the_same_on_every_machine() -> None:
    assert derived_seed(0) == 7520536977032167579
    assert derived_seed(7, "batches", "slow-00", 3) == 2908034070858860659


@given(st.integers(0, 2**40), PURPOSES)
def test_a_seed_fits_every_generator(seed: int, purpose: list[str | int]) -> None:
    assert 0 <= derived_seed(seed, *purpose) < 2**63
    assert torch_generator(seed, *purpose).initial_seed() == derived_seed(seed, *purpose)


@given(st.integers(0, 99), st.integers(0, 99), PURPOSES, PURPOSES)
def test_other_purposes_draw_other_numbers(
    one: int, other: int, purpose: list[str | int], another: list[str | int]
) -> None:
    same = (one, purpose) == (other, another)
    assert (derived_seed(one, *purpose) == derived_seed(other, *another)) == same
    draws = [random_generator(one, *purpose).random(), random_generator(other, *another).random()]
    assert (draws[0] == draws[1]) == same


def test_joined_names_are_not_parted_ones() -> None:
    seeds = {
        derived_seed(0, "a", "b"),
        derived_seed(0, "ab"),
        derived_seed(0, "a,b"),
        derived_seed(0, 1),
        derived_seed(0, "1"),
    }
    assert len(seeds) == 5


def test_what_is_drawn_elsewhere_does_not_matter() -> None:
    first = torch.randn(3, generator=torch_generator(0, "x"))
    torch.randn(5)
    torch_generator(0, "y")
    assert torch.equal(first, torch.randn(3, generator=torch_generator(0, "x")))
