from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from export_cases import field_of, tensors_of, written_gguf
from families import recipe
from hypothesis import given
from hypothesis import strategies as st

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import UnexportableError
from spinecli.exports import gguf_file
from spinecli.exports.config import Quantization
from spinecli.exports.gguf_file import GgmlType, encode, falls_back, storage_type, stored_bytes
from spinecli.exports.layout import GgufTensor


def tensor(name: str, *shape: int) -> GgufTensor:
    return GgufTensor(name, shape, lambda: torch.zeros(shape))


@given(seed=st.integers(0, 10), blocks=st.integers(1, 4), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_errors_stay_below_half_a_step(seed: int, blocks: int, scale: float) -> None:
    value = scale * torch.randn(5, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    largest = value.reshape(5, blocks, 32).abs().amax(dim=-1, keepdim=True)
    # the scale itself is rounded to float16, a relative 2^-11; q4_0 takes one end of its range from -8 to 7 exactly
    for stored, step in ((GgmlType.Q8_0, 1 / 127), (GgmlType.Q4_0, 1 / 8)):
        packed = encode("x", value, stored).reshape(5, -1)
        found = torch.from_numpy(gguf.quants.dequantize(packed, stored)).reshape(5, blocks, 32)
        error = (found - value.reshape(5, blocks, 32)).abs()
        bound = 0.5 if stored is GgmlType.Q8_0 else 1.0
        smallest = 128 * 2**-25  # float16 has no finer scales
        assert bool((error <= largest * (step * bound * 1.01 + 2**-10) + smallest).all())


def test_large_tensors_are_packed_piece_by_piece_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = {stored: encode("x", value, stored).tobytes() for stored in (GgmlType.F16, GgmlType.F32, GgmlType.Q8_0)}
    monkeypatch.setattr(gguf_file, "_CHUNK_VALUES", 64 * 5)
    assert {stored: encode("x", value, stored).tobytes() for stored in whole} == whole


def test_rows_that_fit_no_block_stay_in_f16() -> None:
    odd, even = tensor("blk.0.ffn_down.weight", 8, 40), tensor("blk.0.ffn_up.weight", 8, 64)
    assert storage_type(odd, Quantization.q8_0) is GgmlType.F16
    assert storage_type(odd, Quantization.q4_0) is GgmlType.F16
    assert falls_back(odd, Quantization.q4_0)
    assert not falls_back(odd, Quantization.f16)
    assert storage_type(even, Quantization.q4_0) is GgmlType.Q4_0
    assert not falls_back(even, Quantization.q4_0)


def test_vectors_are_never_rounded_and_the_vocabulary_is_spared() -> None:
    for quantization in Quantization:
        assert storage_type(tensor("output_norm.weight", 64), quantization) is GgmlType.F32
    assert storage_type(tensor("token_embd.weight", 8, 64), Quantization.q4_0) is GgmlType.Q8_0
    assert storage_type(tensor("output.weight", 8, 64), Quantization.q4_0) is GgmlType.Q8_0


def test_sizes_are_those_of_the_format() -> None:
    assert stored_bytes((4, 64), GgmlType.F32) == 1024
    assert stored_bytes((4, 64), GgmlType.Q8_0) == 4 * 2 * 34
    assert stored_bytes((4, 64), GgmlType.Q4_0) == 4 * 2 * 18


def test_a_value_beyond_f16_is_refused_by_name() -> None:
    value = torch.ones(2, 32)
    value[1, 3] = 7e4
    with pytest.raises(UnexportableError, match=r"blk\.0\.x holds 7e\+04"):
        encode("blk.0.x", value, GgmlType.F16)
    assert encode("blk.0.x", value, GgmlType.F32).nbytes == 256


def test_a_file_of_each_kind(tmp_path: Path) -> None:
    made = recipe("llama", grouped=True, channels=64, dtype="bfloat16")
    checkpoint = Checkpoint.open(made.write(tmp_path / "checkpoint"))
    sizes = {}
    for quantization in Quantization:
        path = tmp_path / f"{quantization.value}.gguf"
        model = written_gguf(path, checkpoint, quantization)
        assert model.fallen_back() == []
        assert sum(model.tensors_by_type().values()) == len(tensors_of(path))
        assert field_of(path, "general.file_type") == gguf_file.FILE_TYPES[quantization]
        sizes[quantization] = path.stat().st_size
    assert sizes[Quantization.f32] > sizes[Quantization.f16] > sizes[Quantization.q8_0] > sizes[Quantization.q4_0]
    exact = tensors_of(tmp_path / "f32.gguf")
    # every bfloat16 weight of this size is a float16 as well
    rounded = tensors_of(tmp_path / "f16.gguf")
    assert all(torch.allclose(rounded[name], value, rtol=0, atol=2**-25) for name, value in exact.items())
