from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import VARIANTS, Recipe, random_tokens

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.checkpoints.stream.objective import NEXT_TOKEN_LOSS, OUTPUT_DISTANCE, objective_of

Opened = Callable[[Recipe], Checkpoint]
TOKENS = random_tokens(3, 16)


@pytest.mark.parametrize("name", VARIANTS)
def test_only_causal_language_models_have_a_loss(opened: Opened, name: str) -> None:
    objective = objective_of(opened(VARIANTS[name]))
    assert objective is (NEXT_TOKEN_LOSS if VARIANTS[name].task == "causal-lm" else OUTPUT_DISTANCE)


@pytest.mark.parametrize("name", ["bert", "bert bare", "roberta masked", "narrow bert", "llama classifier"])
def test_the_distance_is_relative_and_squared(opened: Opened, name: str) -> None:
    stream = BlockStream(opened(VARIANTS[name]), 16)
    dense = stream.forward(TOKENS)
    assert OUTPUT_DISTANCE.measure(stream, dense, dense, TOKENS) == 0
    moved = dense + 0.1 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    features, wanted = (torch.cat(list(stream.features(states))) for states in (moved, dense))
    expected = ((features - wanted).norm() / wanted.norm()) ** 2
    assert expected > 1e-4
    assert OUTPUT_DISTANCE.measure(stream, moved, dense, TOKENS) == pytest.approx(float(expected), rel=1e-4)


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
