from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import VARIANTS, VOCABULARY, Recipe, answers, load, random_tokens, recipe
from torch import Tensor

import spinecli.checkpoints.stream.objective as objective
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.checkpoints.stream.objective import DIVERGENCE, OUTPUT_DISTANCE, objective_of

Opened = Callable[[Recipe], Checkpoint]
TOKENS = random_tokens(3, 16)


@pytest.mark.parametrize("name", VARIANTS)
def test_only_causal_language_models_are_judged_by_their_next_tokens(opened: Opened, name: str) -> None:
    found = objective_of(opened(VARIANTS[name]))
    assert found is (DIVERGENCE if VARIANTS[name].task == "causal-lm" else OUTPUT_DISTANCE)


CAPPED = recipe("gemma2", tied=True, extra=(("final_logit_softcapping", 2.0),))
CAUSAL = {name: made for name, made in VARIANTS.items() if made.task == "causal-lm"} | {"gemma2 low cap": CAPPED}


def moved(hidden: Tensor, seed: int = 0, by: float = 0.3) -> Tensor:
    """Hidden states some way off, by a share of each row's size."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
    return hidden + by * noise * hidden.square().mean(dim=(1, 2), keepdim=True).sqrt()


def explicit_divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL(dense || model) of every row from whole logits, (rows, length, vocabulary) -> (rows,)."""
    wanted = dense.double().softmax(dim=-1)
    return (wanted * (wanted.log() - logits.double().log_softmax(dim=-1))).sum(dim=-1).mean(dim=1)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_divergence_is_that_of_the_whole_logits(opened: Opened, name: str) -> None:
    checkpoint = opened(CAUSAL[name])
    stream = BlockStream(checkpoint, 16)
    dense = stream.forward(TOKENS)
    models = {"near": moved(dense, 0, 0.1), "far": moved(dense, 1)}
    found = DIVERGENCE.measure(stream, models, dense)
    assert list(found) == ["near", "far"]
    wanted = answers(load(checkpoint.path), TOKENS)
    for model, hidden in models.items():
        expected = explicit_divergence(wanted, torch.cat(list(stream.logits(hidden))))
        assert expected.min() > 1e-4
        assert found[model].dtype is torch.float64
        torch.testing.assert_close(found[model], expected, rtol=1e-3, atol=1e-5)
    assert (found["near"] < found["far"]).all()


def test_a_cap_on_the_logits_counts(opened: Opened) -> None:
    """Without this, the test above could pass with the cap ignored on both sides."""
    stream = BlockStream(opened(CAPPED), 16)
    hidden = stream.forward(TOKENS)
    logits = torch.cat(list(stream.logits(hidden)))
    plain = torch.cat(list(stream.features(hidden))) @ stream.checkpoint.read("model.embed_tokens.weight").T
    assert plain.abs().max() > 4
    torch.testing.assert_close(logits, 2 * (plain / 2).tanh(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "llama grouped tied", "gemma2 low cap", "opt post-norm"])
def test_the_divergence_does_not_depend_on_how_many_tokens_are_in_memory(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stream = BlockStream(opened(CAUSAL[name]), 16)
    dense = stream.forward(TOKENS)
    models = {"model": moved(dense)}
    together = DIVERGENCE.measure(stream, models, dense)["model"]
    for tokens in (1, 7, 20, 47):
        monkeypatch.setattr(objective, "_LOGIT_BYTES", tokens * 4 * VOCABULARY)
        torch.testing.assert_close(DIVERGENCE.measure(stream, models, dense)["model"], together)


def test_the_divergence_begins_with_the_first_token_that_is_predicted(opened: Opened) -> None:
    """Special tokens in front of a row are given; what is thought of them does not count."""
    checkpoint = opened(CAUSAL["llama"])
    stream = BlockStream(checkpoint, 16, opening=3)
    dense = stream.forward(TOKENS)
    hidden = moved(dense)
    found = DIVERGENCE.measure(stream, {"model": hidden}, dense)["model"]
    logits = [torch.cat(list(stream.logits(states)))[:, 2:] for states in (dense, hidden)]
    torch.testing.assert_close(found, explicit_divergence(*logits), rtol=1e-4, atol=1e-6)
    hidden[:, :2] = moved(dense, 5)[:, :2]
    assert torch.equal(DIVERGENCE.measure(stream, {"model": hidden}, dense)["model"], found)
    hidden[:, 2] = moved(dense, 5)[:, 2]
    assert not torch.equal(DIVERGENCE.measure(stream, {"model": hidden}, dense)["model"], found)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_dense_model_itself_is_at_nothing(opened: Opened, name: str) -> None:
    stream = BlockStream(opened(VARIANTS[name]), 16)
    dense = stream.forward(TOKENS)
    found = objective_of(stream.checkpoint).measure(stream, {"dense": dense.clone()}, dense)["dense"]
    assert torch.equal(found, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["bert", "bert bare", "roberta masked", "narrow bert", "llama classifier"])
def test_the_distance_is_relative_and_squared(opened: Opened, name: str) -> None:
    stream = BlockStream(opened(VARIANTS[name]), 16)
    dense = stream.forward(TOKENS)
    models = {"near": moved(dense, 0, 0.1), "far": moved(dense, 1)}
    found = OUTPUT_DISTANCE.measure(stream, models, dense)
    wanted = torch.cat(list(stream.features(dense)))
    for model, hidden in models.items():
        features = torch.cat(list(stream.features(hidden)))
        expected = ((features - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)) ** 2
        assert expected.min() > 1e-4
        torch.testing.assert_close(found[model], expected.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["bert", "roberta bare"])
def test_what_the_head_of_an_encoder_sees_is_the_last_blocks_output(opened: Opened, name: str) -> None:
    stream = BlockStream(opened(VARIANTS[name]), 16)
    hidden = stream.forward(TOKENS)
    assert torch.equal(torch.cat(list(stream.features(hidden))), hidden)


def test_what_the_head_of_a_llama_sees_is_normed(opened: Opened) -> None:
    checkpoint = opened(VARIANTS["llama"])
    stream = BlockStream(checkpoint, 16)
    hidden = stream.forward(TOKENS)
    features = torch.cat(list(stream.features(hidden)))
    by_head = features @ checkpoint.read("lm_head.weight").T
    torch.testing.assert_close(by_head, torch.cat(list(stream.logits(hidden))), atol=1e-4, rtol=0)
