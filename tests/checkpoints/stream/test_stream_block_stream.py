from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import VARIANTS, Recipe, answers, load, random_tokens, recipe
from torch import Tensor
from transformers import AutoModelForCausalLM

import spinecli.checkpoints.stream.block_stream as stream_module
from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.stream.block_stream import BlockStream, ComputeOptions, compute_options
from spinecli.checkpoints.stream.observation import entering, masked, observed
from spinecli.checkpoints.stream.verify import streamed_logits
from spinecli.errors import OptionError

Opened = Callable[[Recipe], Checkpoint]


def transformers_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    return answers(load(checkpoint.path), tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_stream_equals_transformers(opened: Opened, name: str) -> None:
    checkpoint = opened(VARIANTS[name])
    tokens = random_tokens(3, 20)
    expected = transformers_logits(checkpoint, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(streamed_logits(checkpoint, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mistral window", "qwen2 mixed windows", "qwen3 mixed windows"])
def test_windows_matter_in_the_rows_that_are_compared(opened: Opened, name: str) -> None:
    """Without this, the test above could pass with the windows ignored on both sides."""
    short = opened(VARIANTS[name])
    tokens = random_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 0] = 3 if tokens[0, 0] != 3 else 4
    with_window = (streamed_logits(short, tokens) - streamed_logits(short, changed))[0].abs().amax(dim=-1)
    assert with_window[1] > 1e-4
    if name == "mistral window":  # three blocks of six tokens see back sixteen tokens at most
        assert with_window[-1] == 0


@pytest.mark.parametrize(
    "name", ["llama", "mistral window", "qwen2 mixed windows", "opt post-norm", "bert", "roberta masked"]
)
def test_chunks_do_not_change_the_result(opened: Opened, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    checkpoint = opened(VARIANTS[name])
    tokens = random_tokens(5, 16)
    monkeypatch.setattr(stream_module, "CHUNK_TOKENS", 32)
    assert BlockStream(checkpoint, 16).chunk_rows == 2
    found = streamed_logits(checkpoint, tokens)
    torch.testing.assert_close(found, transformers_logits(checkpoint, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama classifier", "opt classifier"])
def test_a_causal_classifier_answers_from_the_last_token_even_if_it_looks_like_padding(
    opened: Opened, name: str
) -> None:
    checkpoint = opened(VARIANTS[name])
    tokens = random_tokens(3, 20)
    tokens[1, -1] = tokens[2, 4] = checkpoint.config.pad_token_id
    found = streamed_logits(checkpoint, tokens)
    model = load(checkpoint.path)
    model.config.pad_token_id = None
    expected = torch.cat([answers(model, row[None]) for row in tokens])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - answers(load(checkpoint.path), tokens))[1].abs().max() > 1e-3
    assert checkpoint.config.pad_token_id == 0


@pytest.mark.parametrize("name", ["bert", "roberta masked"])
def test_every_token_of_an_encoder_sees_every_other(opened: Opened, name: str) -> None:
    checkpoint = opened(VARIANTS[name])
    stream = BlockStream(checkpoint, 20)
    tokens = random_tokens(1, 20)
    changed = tokens.clone()
    changed[0, -1] = 3 if tokens[0, -1] != 3 else 4
    states = []
    for row in (tokens, changed):
        hidden = stream.embed(row)
        with stream.block(0) as block:
            states.append(stream.run(block, hidden))
    assert (states[0] - states[1]).abs().amax(dim=-1).min() > 1e-5


def test_a_row_longer_than_a_chunk_passes_alone(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHUNK_TOKENS", 8)
    checkpoint = opened(recipe("llama"))
    tokens = random_tokens(2, 16)
    torch.testing.assert_close(
        streamed_logits(checkpoint, tokens), transformers_logits(checkpoint, tokens), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_halves_are_computed_in_full_precision(opened: Opened, dtype: str) -> None:
    checkpoint = opened(recipe("llama", dtype=dtype))
    tokens = random_tokens(2, 12)
    torch.testing.assert_close(
        streamed_logits(checkpoint, tokens), transformers_logits(checkpoint, tokens), atol=1e-5, rtol=1e-5
    )


def test_sharded_and_single_files_give_the_same(opened: Opened) -> None:
    tokens = random_tokens(2, 12)
    one, many = (streamed_logits(opened(recipe("llama", shard_size=size)), tokens) for size in ("5GB", "20KB"))
    assert torch.equal(one, many)


@pytest.mark.parametrize(
    "name", ["llama", "llama grouped tied", "opt post-norm", "bert", "bert bare", "roberta masked"]
)
def test_only_what_runs_is_in_memory(opened: Opened, name: str) -> None:
    stream = BlockStream(opened(VARIANTS[name]), 8)

    def loaded() -> set[str]:
        parameters = stream._model.named_parameters()
        return {key for key, value in parameters if value.device.type != "meta"}

    assert loaded() == set()
    hidden = stream.embed(random_tokens(2, 8))
    assert loaded() == set()
    with stream.block(1) as block:
        prefix = stream.checkpoint.block_prefix(1)
        assert loaded() == {name for name in stream.checkpoint.tensors if name.startswith(prefix)}
        stream.run(block, hidden)
    assert loaded() == set()
    list(stream.logits(hidden))
    assert loaded() == set()


def test_a_block_can_be_loaded_again(opened: Opened) -> None:
    stream = BlockStream(opened(recipe("llama")), 8)
    hidden = stream.embed(random_tokens(2, 8))
    with stream.block(0) as block:
        first = stream.run(block, hidden)
    with stream.block(0) as block:
        block.linear("mlp.down_proj").weight.zero_()
    with stream.block(0) as block:
        assert torch.equal(stream.run(block, hidden), first)


def test_losses_are_mean_nats_of_the_next_token(opened: Opened) -> None:
    checkpoint = opened(recipe("qwen3", grouped=True))
    tokens = random_tokens(3, 10)
    stream = BlockStream(checkpoint, 10)
    probabilities = transformers_logits(checkpoint, tokens).double().softmax(dim=-1)
    by_hand = [
        -sum(float(probabilities[row, place, tokens[row, place + 1]].log()) for place in range(9)) / 9
        for row in range(3)
    ]
    torch.testing.assert_close(
        stream.losses(stream.forward(tokens), tokens), torch.tensor(by_hand).double(), atol=1e-5, rtol=0
    )


def test_reading_is_counted_apart(opened: Opened) -> None:
    context = RunContext()
    with context.stopwatch("computing"):
        streamed_logits(opened(recipe("llama")), random_tokens(1, 8), context=context)
    seconds = context.stopwatch.measured().seconds
    assert seconds["reading"] > 0
    assert seconds["computing"] + seconds["reading"] == pytest.approx(seconds["total"], abs=0.01)


def test_masked_units_add_nothing(opened: Opened) -> None:
    checkpoint = opened(recipe("llama"))
    stream = BlockStream(checkpoint, 8)
    hidden = stream.embed(random_tokens(2, 8))
    nothing = BlockMask(torch.zeros(4, dtype=torch.bool), torch.zeros(40, dtype=torch.bool))
    with stream.block(0) as block:
        before = stream.run(block, hidden)
        with masked(block, checkpoint.family, checkpoint.shape, nothing):
            torch.testing.assert_close(stream.run(block, hidden), hidden)
        assert torch.equal(stream.run(block, hidden), before)


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_streamed_masks_equal_a_cut_by_hand(opened: Opened, family: str) -> None:
    checkpoint = opened(recipe(family))
    tokens = random_tokens(2, 10)
    generator = torch.Generator().manual_seed(3)
    masks = Masks(
        tuple(
            BlockMask(torch.ones(4, dtype=torch.bool), torch.rand(40, generator=generator) > 0.4)
            if index != 1
            else BlockMask(torch.zeros(4, dtype=torch.bool), torch.zeros(40, dtype=torch.bool))
            for index in range(3)
        )
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    holder = model.model.decoder if family == "opt" else model.model
    for index, mask in enumerate(masks.blocks):
        block = holder.layers[index]
        output = block.fc2 if family == "opt" else block.mlp.down_proj
        output.weight.data[:, ~mask.channels] = 0
    del holder.layers[1]
    with torch.no_grad():
        model.config.num_hidden_layers = 2
        expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(streamed_logits(checkpoint, tokens, masks), expected, atol=1e-4, rtol=0)


def test_observers_see_every_token_once(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHUNK_TOKENS", 16)
    stream = BlockStream(opened(recipe("llama")), 8)
    hidden = stream.embed(random_tokens(5, 8))
    seen: list[tuple[Tensor, Tensor]] = []
    with stream.block(0) as block:
        with observed(block, {"mlp.down_proj": lambda inputs, outputs: seen.append((inputs, outputs))}):
            stream.run(block, hidden)
        weight = block.linear("mlp.down_proj").weight
        inputs, outputs = (torch.cat(parts) for parts in zip(*seen, strict=True))
        assert inputs.shape == (40, 40)
        torch.testing.assert_close(outputs, inputs @ weight.T)
        stream.run(block, hidden)
        assert len(seen) == 3
        torch.testing.assert_close(entering(block, "mlp.down_proj", hidden), inputs)


def test_what_enters_a_projection_is_found_without_what_lies_behind_it(opened: Opened) -> None:
    stream = BlockStream(opened(recipe("llama")), 8)
    hidden = stream.embed(random_tokens(2, 8))
    with stream.block(0) as block:
        reached = []
        block.linear("mlp.up_proj").register_forward_hook(lambda *_: reached.append(1))
        assert entering(block, "self_attn.o_proj", hidden).shape == (16, 32)
        assert reached == []


def test_observers_see_what_passes_on_the_way_to_a_projection(opened: Opened) -> None:
    stream = BlockStream(opened(recipe("llama")), 8)
    hidden = stream.embed(random_tokens(2, 8))
    passed: dict[str, Tensor] = {}
    observers = {
        name: lambda _, outputs, name=name: passed.update({name: outputs})
        for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }
    with stream.block(0) as block, torch.no_grad():
        found = entering(block, "mlp.down_proj", hidden, observers)
        attended = entering(block, "self_attn.o_proj", hidden)
        torch.testing.assert_close(passed["self_attn.o_proj"], attended @ block.linear("self_attn.o_proj").weight.T)
    assert found.shape == passed["mlp.up_proj"].shape == (16, 40)
    assert "mlp.down_proj" not in passed


def test_a_projection_that_a_block_never_runs_is_told(opened: Opened) -> None:
    stream = BlockStream(opened(recipe("llama")), 8)
    hidden = stream.embed(random_tokens(2, 8))
    with stream.block(0) as block:
        block.module.forward = lambda hidden, **_: hidden
        with pytest.raises(ValueError, match=r"block 0 never runs mlp\.down_proj"):
            entering(block, "mlp.down_proj", hidden)


def test_an_absent_device_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="--device meta9 cannot be used here"):
        compute_options("meta9", "float32")
    assert compute_options("cpu", "bfloat16") == ComputeOptions("cpu", torch.bfloat16)
