from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.config import read_config
from spinecli.errors import OptionError
from spinecli.evaluation.sweep.config import SweepConfig


def ratios(text: object, step: float | None = None) -> tuple[float, ...]:
    given = {"model": "model", "sparsity": text, **({} if step is None else {"step": step})}
    return read_config(SweepConfig, None, given).sparsities


@pytest.mark.parametrize(
    ("text", "step", "wanted"),
    [
        ("0.3", None, (0.3,)),
        ("0.3, 0.1,0.2", None, (0.1, 0.2, 0.3)),
        ("0.1..0.5", None, (0.1, 0.2, 0.3, 0.4, 0.5)),
        ("0.1..0.5", 0.2, (0.1, 0.3, 0.5)),
        ("0.1..0.45", None, (0.1, 0.2, 0.3, 0.4)),
        ("0.2..0.2", None, (0.2,)),
        ("0.05,0.1..0.3,0.7", 0.1, (0.05, 0.1, 0.2, 0.3, 0.7)),
        ("0.10,0.1", None, (0.1,)),
        (0.3, None, (0.3,)),
        ([0.2, 0.1], None, (0.1, 0.2)),
    ],
)
def test_ratios_as_a_person_writes_them(text: object, step: float | None, wanted: tuple[float, ...]) -> None:
    assert ratios(text, step) == wanted


@given(first=st.integers(1, 60), count=st.integers(1, 20), step=st.integers(1, 2))
def test_a_range_holds_its_exact_decimal_steps(first: int, count: int, step: int) -> None:
    last = Decimal(first + (count - 1) * step) / 100
    found = ratios(f"{Decimal(first) / 100}..{last}", step / 100)
    assert found == tuple(float(Decimal(first + index * step) / 100) for index in range(count))


@pytest.mark.parametrize(
    ("text", "step", "words"),
    [
        ("0.5..0.1", None, "--sparsity 0.5..0.1 runs backwards; write 0.1..0.5"),
        ("0..0.5", None, "between 0 and 1, not 0"),
        ("0.1..1", None, "between 0 and 1, not 1"),
        ("30%", None, "'30%', which is not a number"),
        ("0.1,,0.2", None, "'', which is not a number"),
        ("", None, "which is not a number"),
        ("nan", None, "between 0 and 1"),
        ("0.1...0.5", None, "between 0 and 1|not a number"),
        ("0.1..0.5", 0.0, "--step must be above 0"),
        ("0.1..0.5", -0.1, "--step must be above 0"),
        ("0.1..0.5", float("nan"), "--step must be above 0"),
        ("0.1,0.2", 0.1, "--step belongs to a range"),
        ("0.1..0.5", 1e-9, "more than 100; name fewer, or raise --step"),
    ],
)
def test_mistakes_are_told(text: str, step: float | None, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ratios(text, step)
