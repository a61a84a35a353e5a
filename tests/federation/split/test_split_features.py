from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spinecli.errors import MessageError
from spinecli.federation.config import FeatureDtype
from spinecli.federation.split.messages import bytes_per_token, packed, padded, unpacked, unpadded

DTYPES: tuple[FeatureDtype, ...] = get_args(FeatureDtype)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@st.composite
def features(draw: st.DrawFn) -> Tensor:
    """(tokens, d_model), of sizes from tiny to huge, with rows of zeros."""
    tokens, width = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sizes = torch.tensor(
        draw(st.lists(st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e4, 1e20]), min_size=tokens, max_size=tokens))
    )
    return torch.randn(tokens, width, generator=generator) * sizes[:, None]


def crossed(values: Tensor, dtype: FeatureDtype) -> Tensor:
    return unpacked(packed(values, dtype), *values.shape, dtype)


@given(features())
def test_fp32_is_exact(values: Tensor) -> None:
    assert torch.equal(crossed(values, "fp32"), values)


@given(features())
def test_bf16_keeps_eight_bits_of_each_number(values: Tensor) -> None:
    found = crossed(values, "bf16")
    assert found.dtype is torch.float32
    assert bool(((found - values).abs() <= values.abs() * 2**-8).all())


@given(features())
def test_int8_is_off_by_half_a_step_of_its_token(values: Tensor) -> None:
    found = crossed(values, "int8")
    steps = values.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((found - values).abs() <= steps * 0.5001).all())
    assert bool((found.abs().amax(dim=1) <= values.abs().amax(dim=1) * (1 + 1e-6)).all())


@every_dtype
@given(features())
def test_what_has_crossed_once_crosses_unchanged(dtype: FeatureDtype, values: Tensor) -> None:
    once = crossed(values, dtype)
    torch.testing.assert_close(crossed(once, dtype), once, atol=0, rtol=1e-6)


@every_dtype
@given(features())
def test_bytes_per_token_are_those_of_the_tensors(dtype: FeatureDtype, values: Tensor) -> None:
    tokens, width = values.shape
    assert sum(tensor.nbytes for tensor in packed(values, dtype).values()) == tokens * bytes_per_token(width, dtype)


def test_smaller_types_send_less() -> None:
    assert [bytes_per_token(768, dtype) for dtype in ("fp32", "bf16", "int8")] == [3072, 1536, 772]


@every_dtype
@given(features(), st.sampled_from(["tokens", "width", "type", "missing"]))
def test_other_sizes_and_types_are_refused(dtype: FeatureDtype, values: Tensor, wrong: str) -> None:
    tokens, width = values.shape
    tensors = packed(values, dtype)
    if wrong == "tokens":
        tokens += 1
    elif wrong == "width":
        width += 1
    elif wrong == "type":
        tensors["values"] = tensors["values"].to(torch.float64)
    else:
        del tensors["values"]
    with pytest.raises(MessageError, match="features are"):
        unpacked(tensors, tokens, width, dtype)


@pytest.mark.parametrize("scales", [None, torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.float64)])
def test_int8_without_one_scale_a_token_is_refused(scales: Tensor | None) -> None:
    tensors = {"values": torch.ones(2, 4, dtype=torch.int8)}
    if scales is not None:
        tensors["scales"] = scales
    with pytest.raises(MessageError, match="scale"):
        unpacked(tensors, 2, 4, "int8")


@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_refused(dtype: FeatureDtype, value: float) -> None:
    values = torch.ones(3, 4)
    tensors = packed(values, dtype)
    spoiled = tensors["scales" if dtype == "int8" else "values"]
    spoiled[1] = value
    with pytest.raises(MessageError, match="NaN"):
        unpacked(tensors, 3, 4, dtype)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_padding_comes_and_goes(lengths: list[int], seed: int) -> None:
    values = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    rows, mask = padded(values, torch.tensor(lengths))
    assert rows.shape == (len(lengths), max(lengths), 3)
    assert mask.sum(dim=1).tolist() == lengths
    assert not rows[mask == 0].any()
    assert torch.equal(unpadded(rows, mask), values)
    assert bool((mask[:, 1:] <= mask[:, :-1]).all())  # tokens first, padding behind
