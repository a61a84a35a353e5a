from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spinecli.federation.client.adapted_linear import AdaptedLinear

D_OUT, D_IN = 9, 7
AXES = st.integers(0, 1)
SEEDS = st.integers(0, 999)


class Bench:
    """A Linear, what wraps it, factors and an input, all drawn from one seed."""

    def __init__(self, seed: int, *, bias: bool = True, rank: int = 3) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(D_IN, D_OUT, bias=bias)
        for parameter in self.linear.parameters():
            parameter.data = self.draw(*parameter.shape)
        self.before = {name: value.clone() for name, value in self.linear.state_dict().items()}
        self.adapted = AdaptedLinear(self.linear)
        self.a, self.b = self.draw(rank, D_IN), self.draw(D_OUT, rank)
        self.hidden = self.draw(2, 5, D_IN)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def kept(self, axis: int, among: Tensor | None = None) -> Tensor:
        """About two thirds of the rows or columns that are there, at least one."""
        units = torch.arange((D_OUT, D_IN)[axis]) if among is None else among
        chosen = units[torch.rand(len(units), generator=self.generator) < 0.66]
        return chosen if len(chosen) else units[:1]

    def narrowed_answer(self, axis: int, kept: Tensor) -> Tensor:
        """What the narrow projection says, of the inputs that it still has."""
        return self.adapted(self.hidden if axis == 0 else self.hidden[..., kept])

    def masked_answer(self, axis: int, kept: Tensor, weight: Tensor) -> Tensor:
        """The same by masking: rows that are gone are left out, columns that are gone see zeros."""
        bias = self.before.get("bias")
        if axis == 0:
            return nn.functional.linear(self.hidden, weight, bias)[..., kept]
        masked = torch.zeros_like(self.hidden)
        masked[..., kept] = self.hidden[..., kept]
        return nn.functional.linear(masked, weight, bias)


def is_dense(bench: Bench) -> bool:
    """Bit for bit, in the model's own memory, and without factors."""
    adapted, state = bench.adapted, bench.linear.state_dict()
    return (
        all(torch.equal(state[name], value) for name, value in bench.before.items())
        and adapted.weight.data_ptr() == bench.linear.weight.data_ptr()
        and (adapted.bias is None if bench.linear.bias is None else torch.equal(adapted.bias, bench.before["bias"]))
        and adapted.a is None
        and adapted.b is None
        and torch.equal(adapted(bench.hidden), bench.linear(bench.hidden))
    )


@given(SEEDS, st.booleans())
def test_without_factors_it_is_the_linear(seed: int, bias: bool) -> None:
    bench = Bench(seed, bias=bias)
    assert torch.equal(bench.adapted(bench.hidden), bench.linear(bench.hidden))
    assert (bench.adapted.out_features, bench.adapted.in_features) == bench.adapted.dense_shape == (D_OUT, D_IN)


@given(SEEDS, st.floats(0.1, 8))
def test_with_factors_it_is_the_linear_with_their_product_added(seed: int, scale: float) -> None:
    bench = Bench(seed)
    bench.adapted.attach(bench.a, bench.b, scale)
    weight = bench.before["weight"] + scale * bench.b @ bench.a
    expected = nn.functional.linear(bench.hidden, weight, bench.before["bias"])
    torch.testing.assert_close(bench.adapted(bench.hidden), expected, rtol=1e-4, atol=1e-4)


@given(SEEDS, AXES, st.booleans(), st.booleans())
def test_narrow_equals_masked_twice_in_a_row(seed: int, axis: int, attached: bool, shifted: bool) -> None:
    bench = Bench(seed)
    weight = bench.before["weight"].clone()
    if shifted:
        change = bench.draw(D_OUT, D_IN)
        bench.adapted.shift(change)
        weight += change
    if attached:
        bench.adapted.attach(bench.a, bench.b, 2.0)
        weight += 2.0 * bench.b @ bench.a
    kept: Tensor | None = None
    for _ in range(2):
        kept = bench.kept(axis, kept)
        bench.adapted.narrow(axis, kept)
        assert (bench.adapted.out_features, bench.adapted.in_features)[axis] == len(kept)
        torch.testing.assert_close(
            bench.narrowed_answer(axis, kept), bench.masked_answer(axis, kept, weight), rtol=1e-4, atol=1e-4
        )


@given(SEEDS, AXES)
def test_factors_may_come_before_or_after_the_cut(seed: int, axis: int) -> None:
    before, after = Bench(seed), Bench(seed)
    kept = before.kept(axis)
    before.adapted.attach(before.a, before.b, 2.0)
    before.adapted.narrow(axis, kept)
    after.adapted.narrow(axis, kept)
    after.adapted.attach(*((after.a, after.b[kept]) if axis == 0 else (after.a[:, kept], after.b)), 2.0)
    assert torch.equal(before.narrowed_answer(axis, kept), after.narrowed_answer(axis, kept))


@given(SEEDS, st.lists(st.sampled_from(["attach", "shift", "rows", "columns", "train"]), max_size=8))
def test_after_any_sequence_the_shared_weight_is_untouched_and_comes_back(seed: int, steps: list[str]) -> None:
    bench = Bench(seed)
    axis, kept = None, None
    for step in steps:
        adapted = bench.adapted
        if step == "attach":
            adapted.attach(
                bench.draw(3, adapted.in_features), bench.draw(adapted.out_features, 3), 2.0, train_a=seed % 2 == 0
            )
        elif step == "shift" and kept is None:
            adapted.shift(bench.draw(D_OUT, D_IN))
        elif step in ("rows", "columns") and axis in (None, int(step == "columns")):
            axis = int(step == "columns")
            kept = bench.kept(axis, kept)
            adapted.narrow(axis, kept)
        elif step == "train" and adapted.b is not None:
            factors = [factor for factor in (adapted.a, adapted.b) if factor is not None and factor.requires_grad]
            adapted(bench.draw(4, adapted.in_features)).square().sum().backward()
            assert adapted.b.grad is not None
            torch.optim.SGD(factors, lr=0.1).step()
    for name, value in bench.before.items():
        assert torch.equal(bench.linear.state_dict()[name], value)
    bench.adapted.restore()
    assert is_dense(bench)


def test_attached_factors_are_copies_and_train_as_they_are_told() -> None:
    bench = Bench(0)
    bench.adapted.attach(bench.a, bench.b, 1.0, train_a=False)
    assert bench.adapted.a is not None
    assert bench.adapted.b is not None
    assert (bench.adapted.a.requires_grad, bench.adapted.b.requires_grad) == (False, True)
    sent = bench.b.clone()
    with torch.no_grad():
        bench.adapted.b += 1
    assert torch.equal(bench.b, sent)
    bench.adapted.narrow(0, torch.tensor([0, 3]))
    assert (bench.adapted.a.requires_grad, bench.adapted.b.requires_grad) == (False, True)
    bench.adapted.attach(bench.a, bench.b[:2], 1.0, trainable=False)
    assert not any(factor.requires_grad for factor in (bench.adapted.a, bench.adapted.b))


def test_a_narrow_model_stays_in_the_precision_of_the_base() -> None:
    linear = nn.Linear(D_IN, D_OUT).bfloat16()
    adapted = AdaptedLinear(linear)
    adapted.attach(torch.randn(2, D_IN), torch.randn(D_OUT, 2), 1.0)
    adapted.narrow(0, torch.tensor([1, 4]))
    hidden = torch.randn(3, D_IN, dtype=torch.bfloat16)
    assert adapted(hidden).dtype is torch.bfloat16
    assert adapted.b is not None
    assert adapted.b.dtype is torch.float32
