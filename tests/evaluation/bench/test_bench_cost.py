from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import recipe
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from written_gguf import write_gguf_file

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.tokenizer import load_tokenizer
from spinecli.errors import DamagedCheckpointError, MissingPathError, UnsupportedFamilyError
from spinecli.evaluation.bench.cost import Cost, checkpoint_cost
from spinecli.evaluation.bench.gguf_file import read_gguf
from spinecli.exports.config import Quantization

LENGTH = 24


def test_prefill_is_what_torch_counts_but_for_the_scores_that_a_mask_hides(dense: Path) -> None:
    checkpoint = Checkpoint.open(dense)
    cost = checkpoint_cost(checkpoint, torch.float32)
    # the counter does not know the fused attention of the CPU
    model = AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.zeros(2, LENGTH, dtype=torch.long), logits_to_keep=1, use_cache=False)
    hidden = LENGTH * LENGTH - LENGTH * (LENGTH + 1) / 2
    masked = 2 * 4 * cost.query_width * hidden
    assert cost.prefill_flops(LENGTH, 2) + masked == counted.get_total_flops()


def test_a_classifier_that_sees_both_ways_has_no_hidden_scores_and_no_head(tmp_path: Path) -> None:
    cost = checkpoint_cost(
        Checkpoint.open(recipe("bert", task="classification").write(tmp_path / "bert")), torch.float32
    )
    assert cost.head == 0
    assert cost.prefill_flops(10) == 2 * cost.matrices * 10 + 4 * cost.query_width * 100


def test_a_decode_step_reads_the_weights_once_and_the_cache_of_every_row(dense: Path) -> None:
    checkpoint = Checkpoint.open(dense)
    cost = checkpoint_cost(checkpoint, torch.bfloat16)
    embedding = checkpoint.tensors["model.embed_tokens.weight"].bytes // 2
    norm = checkpoint.tensors["model.norm.weight"].bytes // 2
    assert cost.weight_bytes == checkpoint.bytes // 2 - embedding - norm
    per_token = 3 * 2 * 2 * 8 * 2  # blocks, keys and values, KV heads, their size, bytes
    assert cost.decode_bytes(10, 2, batch=1) == cost.weight_bytes + 11 * per_token
    assert cost.decode_bytes(10, 2, batch=5) == cost.weight_bytes + 5 * 11 * per_token


@given(st.integers(1, 50), st.integers(2, 20), st.integers(1, 8))
def test_the_mean_over_the_steps_is_the_mean(length: int, new_tokens: int, batch: int) -> None:
    cost = Cost(matrices=0, head=0, weight_bytes=7, query_width=0, cache_width=3, cache_element=2)
    steps = [7 + batch * 6 * (length + step) for step in range(1, new_tokens)]
    assert cost.decode_bytes(length, new_tokens, batch) == pytest.approx(sum(steps) / len(steps))


def test_a_file_costs_what_its_checkpoint_costs(dense: Path, gguf_file: Path) -> None:
    checkpoint, file = Checkpoint.open(dense), read_gguf(gguf_file)
    plain, written = checkpoint_cost(checkpoint, torch.float32), file.cost()
    assert written.prefill_flops(LENGTH) == plain.prefill_flops(LENGTH)
    assert written.weight_bytes == plain.weight_bytes
    assert written.cache_width == plain.cache_width
    assert (file.vocabulary, file.positions, file.blocks) == (320, 128, 3)
    assert file.precision == "f32"
    assert file.parameters == sum(torch.Size(tensor.shape).numel() for tensor in checkpoint.tensors.values())


def test_a_tied_head_is_read_although_it_is_stored_once(tmp_path: Path) -> None:
    tied = recipe("llama", tied=True).write(tmp_path / "tied")
    file = read_gguf(write_gguf_file(tied, tmp_path / "tied.gguf", Quantization.f32))
    assert file.cost().weight_bytes == checkpoint_cost(Checkpoint.open(tied), torch.float32).weight_bytes
    assert file.cost().head == 320 * 32


def test_quantised_files_say_so(dense: Path, tmp_path: Path, gguf_file: Path) -> None:
    file = read_gguf(write_gguf_file(dense, tmp_path / "q.gguf", Quantization.q8_0))
    assert file.precision == "q8_0"
    assert file.cost().weight_bytes < read_gguf(gguf_file).cost().weight_bytes / 3


def test_files_that_are_none(tmp_path: Path, gguf_file: Path) -> None:
    with pytest.raises(MissingPathError, match=r"absent.gguf does not exist"):
        read_gguf(tmp_path / "absent.gguf")
    whole = gguf_file.read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"hello " * 100,
        "cut": whole[: len(whole) // 2],
        "header": whole[:200],
        "magic": whole[:4],
    }.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=rf"{name}.gguf is not a whole GGUF file"):
            read_gguf(path)


def test_a_file_without_a_language_model(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "vision.gguf", "clip")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedFamilyError, match=r"\(clip\) holds no language model"):
        read_gguf(tmp_path / "vision.gguf")


def test_the_prompt_of_a_file_begins_as_llama_cpp_begins_a_text(tmp_path: Path) -> None:
    model = recipe("llama").write(tmp_path / "model")
    assert read_gguf(write_gguf_file(model, tmp_path / "plain.gguf", Quantization.f32)).opening == ()
    tokenizer = load_tokenizer(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(model)
    assert read_gguf(write_gguf_file(model, tmp_path / "begun.gguf", Quantization.f32)).opening == (1,)
