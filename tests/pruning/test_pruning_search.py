from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import Recipe, random_tokens, recipe

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.shape import BlockShape
from spinecli.checkpoints.stream.block_stream import BlockStream
from spinecli.checkpoints.stream.verify import streamed_logits
from spinecli.pruning.allocation import Allocation, select
from spinecli.pruning.method import UnitScores
from spinecli.pruning.scoring import Scores
from spinecli.pruning.search import Candidate, score_candidates

TOKENS = random_tokens(12, 16)
HELD_OUT = 3


def candidates_of(checkpoint: Checkpoint) -> list[Candidate]:
    generator = torch.Generator().manual_seed(0)
    blocks, shape = checkpoint.blocks, checkpoint.shape
    units = (UnitScores(torch.rand(4, generator=generator), torch.rand(40, generator=generator)) for _ in range(blocks))
    scores = Scores(torch.rand(blocks, generator=generator), tuple(units))
    shapes = [(0, 16), (1, 24), (2, 32)]
    allocations = [Allocation(removed, BlockShape(4, 4, 8, channels), 0.0) for removed, channels in shapes]
    return [Candidate(each, select(scores, each, shape, frozenset())) for each in allocations]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_candidates_do_not_disturb_each_other(opened: Callable[[Recipe], Checkpoint], family: str) -> None:
    stream = BlockStream(opened(recipe(family, blocks=4)), 16)
    candidates = candidates_of(stream.checkpoint)
    together = score_candidates(stream, TOKENS, HELD_OUT, candidates, "comparing")
    assert [each.allocation for each in together] == [candidate.allocation for candidate in candidates]
    alone = [score_candidates(stream, TOKENS, HELD_OUT, [candidate], "comparing")[0] for candidate in candidates]
    assert [each.loss for each in together] == [each.loss for each in alone]
    assert len({each.loss for each in alone}) == 3


def test_an_uncut_candidate_has_the_loss_of_the_dense_model(opened: Callable[[Recipe], Checkpoint]) -> None:
    checkpoint = opened(recipe("llama", blocks=4))
    whole = Candidate(Allocation(0, checkpoint.shape, 0.0), Masks.full((checkpoint.shape,) * 4))
    [judged] = score_candidates(BlockStream(checkpoint, 16), TOKENS, HELD_OUT, [whole], "comparing")
    tokens = TOKENS[-HELD_OUT:]
    logits = streamed_logits(checkpoint, tokens)
    dense = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert judged.loss == pytest.approx(float(dense), abs=1e-3)
