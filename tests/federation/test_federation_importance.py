from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, Recipe, classifier, recipe
from hypothesis import given
from hypothesis import strategies as st
from test_federation_base_model import batch, random_adapter, random_masks
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.data.batches import Batch
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.importance import SCORES, lora_sensitivity, moments, product_kurtosis
from spinecli.federation.client.local_pruning import Importance
from spinecli.federation.client.training import loss_of
from spinecli.federation.config import ScoreName
from spinecli.lora.factors import Factors, fresh_factors

Opened = Callable[[Recipe], Checkpoint]
FAMILIES = {
    "llama grouped": classifier("llama", grouped=True),
    "opt": classifier("opt"),
    "bert": classifier("bert"),
}
NAMES: list[ScoreName] = ["lora", "salience"]


def fresh(base: BaseModel) -> list[Importance]:
    return [Importance.zeros(base.checkpoint.shape) for _ in range(base.checkpoint.blocks)]


def scored(
    base: BaseModel, name: ScoreName, adapter: dict[str, Factors], masks: Masks | None = None, steps: int = 1
) -> list[Importance]:
    """The importance after some backward passes at the same weights."""
    score = SCORES[name](base, fresh(base))
    masks = masks or Masks.full((base.checkpoint.shape,) * base.checkpoint.blocks)
    with base.lent(base.head(), masks):
        base.attach(adapter, 2.0)
        base.trainable()
        for _ in range(steps):
            with score.watching():
                loss_of(base, batch(rows=6)).backward()
            score.after_backward(masks)
    return score.importance


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("made", FAMILIES.values(), ids=FAMILIES.keys())
def test_scores_are_finite_and_tell_units_apart(opened: Opened, made: Recipe, name: ScoreName) -> None:
    base = BaseModel(opened(made), "classification", 3)
    for each in scored(base, name, random_adapter(base, [4] * base.checkpoint.blocks)):
        for values in (each.heads, each.channels):
            assert bool(torch.isfinite(values).all())
            assert bool((values >= 0).all())
            assert len(values.unique()) > len(values) // 2


@pytest.mark.parametrize("targets", ["mlp.down_proj", "self_attn.o_proj", "mlp.up_proj,mlp.down_proj"])
def test_salience_sees_the_first_block_whatever_is_adapted(opened: Opened, targets: str) -> None:
    base = BaseModel(opened(FAMILIES["llama grouped"]), "classification", 3, targets=targets)
    for each in scored(base, "salience", random_adapter(base, [4] * base.checkpoint.blocks)):
        for values in (each.heads, each.channels):
            assert bool((values > 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_units_that_are_gone_keep_their_score_and_the_others_go_on(opened: Opened, name: ScoreName) -> None:
    base = BaseModel(opened(FAMILIES["llama grouped"]), "classification", 3)
    masks = random_masks(base, 3)
    before = [Importance(torch.rand_like(each.heads) + 1, torch.rand_like(each.channels) + 1) for each in fresh(base)]
    score = SCORES[name](base, before)
    with base.lent(base.head()):
        base.attach(random_adapter(base, [4] * base.checkpoint.blocks), 2.0)
        base.cut(masks)
        base.trainable()
        with score.watching():
            loss_of(base, batch()).backward()
        score.after_backward(masks)
    for old, new, mask in zip(before, score.importance, masks.blocks, strict=True):
        for were, are, kept in ((old.heads, new.heads, mask.heads), (old.channels, new.channels, mask.channels)):
            assert torch.equal(were[~kept], are[~kept])
            assert bool((were[kept] != are[kept]).all())
            assert not bool(kept.all())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_a_nan_leaves_the_scores(opened: Opened, name: ScoreName) -> None:
    base = BaseModel(opened(FAMILIES["llama grouped"]), "classification", 3)
    masks = Masks.full((base.checkpoint.shape,) * base.checkpoint.blocks)
    score = SCORES[name](base, fresh(base))
    with base.lent(base.head()):
        base.attach(random_adapter(base, [4] * base.checkpoint.blocks), 2.0)
        parameters = base.trainable()
        for loss_scale in (1.0, float("nan"), float("inf")):
            before = list(score.importance)
            for parameter in parameters:
                parameter.grad = None
            with score.watching():
                (loss_of(base, batch()) * loss_scale).backward()
            score.after_backward(masks)
            pairs = list(zip(before, score.importance, strict=True))
            same = [torch.equal(a, b) for x, y in pairs for a, b in ((x.heads, y.heads), (x.channels, y.channels))]
            assert not any(same) if loss_scale == 1 else all(same)


def test_the_first_step_counts_whole_and_later_ones_by_the_average(opened: Opened) -> None:
    base = BaseModel(opened(FAMILIES["llama grouped"]), "classification", 3)
    adapter = random_adapter(base, [4] * base.checkpoint.blocks)
    once = scored(base, "salience", adapter)
    twice = scored(base, "salience", adapter, steps=2)
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(one.channels, two.channels)  # the same step again changes no average


def permuted_model(directory: Path, made: Recipe, groups: Sequence[int], channels: Sequence[int]) -> Path:
    """The recipe's model with KV groups and channels in another order, which answers the same."""
    made.write(directory)
    checkpoint = Checkpoint.open(directory)
    family, shape = checkpoint.family, checkpoint.shape
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    heads = torch.tensor([group * shape.group_size + i for group in groups for i in range(shape.group_size)])
    rows = unit_rows(heads, shape.head_dim)
    key_rows = unit_rows(torch.tensor(groups), shape.head_dim)
    orders = {
        family.attention.query: (0, rows),
        family.attention.key: (0, key_rows),
        family.attention.value: (0, key_rows),
        family.attention.output: (1, rows),
        **dict.fromkeys(family.feed_forward.inputs, (0, torch.tensor(channels))),
        family.feed_forward.output: (1, torch.tensor(channels)),
    }
    for index in range(checkpoint.blocks):
        for relative, (axis, order) in orders.items():
            linear = model.get_submodule(f"{family.blocks}.{index}.{relative}")
            linear.weight.data = linear.weight.data.index_select(axis, order)
            if linear.bias is not None and axis == 0:
                linear.bias.data = linear.bias.data[order]
    model.save_pretrained(directory)
    return directory


def unit_rows(order: Tensor, size: int) -> Tensor:
    return (order[:, None] * size + torch.arange(size)).flatten()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("made", FAMILIES.values(), ids=FAMILIES.keys())
def test_scores_follow_their_units_into_another_order(
    opened: Opened, tmp_path: Path, made: Recipe, name: ScoreName
) -> None:
    plain = BaseModel(opened(made), "classification", 3)
    shape = plain.checkpoint.shape
    generator = torch.Generator().manual_seed(5)
    groups = torch.randperm(shape.kv_heads, generator=generator).tolist()[::-1]
    channels = torch.randperm(shape.channels, generator=generator).tolist()
    other = BaseModel(Checkpoint.open(permuted_model(tmp_path / "p", made, groups, channels)), "classification", 3)
    # A of the inputs and B of the outputs are those of the residual stream; the others follow their units
    adapter = random_adapter(plain, [4] * plain.checkpoint.blocks)
    heads = torch.tensor([group * shape.group_size + i for group in groups for i in range(shape.group_size)])
    family = plain.family
    orders = {
        family.attention.query: unit_rows(heads, shape.head_dim),
        family.attention.key: unit_rows(torch.tensor(groups), shape.head_dim),
        family.attention.value: unit_rows(torch.tensor(groups), shape.head_dim),
        family.attention.output: unit_rows(heads, shape.head_dim),
        **dict.fromkeys((*family.feed_forward.inputs, family.feed_forward.output), torch.tensor(channels)),
    }
    followed = {}
    for index in range(plain.checkpoint.blocks):
        for relative, order in orders.items():
            full = plain.projection_name(index, relative)
            factors = adapter[full]
            outputs = relative in (family.attention.output, family.feed_forward.output)
            followed[full] = (
                Factors(factors.a[:, order], factors.b) if outputs else Factors(factors.a, factors.b[order])
            )
    for here, there in zip(scored(plain, name, adapter), scored(other, name, followed), strict=True):
        torch.testing.assert_close(here.heads[heads], there.heads, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(here.channels[channels], there.channels, rtol=1e-3, atol=1e-5)


def test_the_sensitivity_of_an_exact_gradient_is_exact() -> None:
    """With A the identity and B zero, gB is c dL/dW, so that S is c |dL/dW * W|."""
    weight, gradient = torch.randn(5, 4), torch.randn(5, 4)
    found = lora_sensitivity(weight, torch.eye(4), torch.zeros(5, 4), torch.zeros(4, 4), 2 * gradient, 2.0)
    torch.testing.assert_close(found, (2 * gradient * weight).abs())


@given(st.integers(0, 999), st.integers(2, 12), st.integers(2, 9), st.floats(1e-6, 1e6), st.floats(-2, 2))
def test_product_kurtosis_equals_its_dense_definition(
    seed: int, tokens: int, d_out: int, scale: float, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = scale * (torch.randn(tokens, 3, generator=generator) + offset)
    weight = torch.randn(d_out, 3, generator=generator) / 100
    products = inputs.double()[:, None, :] * weight.double()[None, :, :]
    centred = (products - products.mean(dim=(0, 1))).flatten(0, 1)
    expected = centred.pow(4).mean(dim=0) / centred.pow(2).mean(dim=0).square()
    torch.testing.assert_close(
        product_kurtosis(moments(inputs), moments(weight)).double(), expected, rtol=2e-3, atol=1e-3
    )


def test_a_dead_channel_has_no_kurtosis_and_spoils_no_other() -> None:
    inputs, weight = torch.randn(20, 4), torch.randn(6, 4)
    inputs[:, 1] = 0
    weight[:, 2] = 0
    inputs[:, 3] = weight[:, 3] = 0.3
    found = product_kurtosis(moments(inputs), moments(weight))
    assert found[1:].tolist() == [0, 0, 0]
    assert 1 < float(found[0]) < 100


def test_a_dead_channel_of_a_relu_scores_low_and_the_others_are_learned(opened: Opened) -> None:
    base = BaseModel(opened(FAMILIES["opt"]), "classification", 3)
    dead = base.projection(0, "fc1")
    assert dead.bias is not None
    with torch.no_grad():
        dead.bias[7] = -1e4
    found = scored(base, "salience", random_adapter(base, [4] * base.checkpoint.blocks))[0].channels
    assert float(found[7]) == 0
    assert bool((found > 0).sum() > len(found) // 2)


HEAVY = recipe("llama", blocks=1, channels=96, extra=(("hidden_size", 64), ("head_dim", 16)), task="classification")


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def toy_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (16, 12), generator=generator)
    return Batch(tokens, torch.ones_like(tokens), tokens[:, -1] % 3, torch.arange(16))


def correlation(base: BaseModel, name: ScoreName, rank: int, seed: int, steps: int = 40) -> float:
    """Spearman correlation of channel scores with the smoothed exact |W dL/dW|, both along the same training."""
    masks = Masks.full((base.checkpoint.shape,) * base.checkpoint.blocks)
    generator = torch.Generator().manual_seed(seed)
    adapter = {key: fresh_factors(*shape, rank, generator) for key, shape in base.target_shapes().items()}
    score = SCORES[name](base, fresh(base))
    feed_forward = base.family.feed_forward
    exact = torch.zeros(base.checkpoint.shape.channels)
    with base.lent(base.head()):
        base.attach(adapter, 2.0)
        parameters = base.trainable()
        optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
        projections = [(base.projection(0, each), 0) for each in feed_forward.inputs]
        projections.append((base.projection(0, feed_forward.output), 1))
        for projection, _ in projections:
            projection.weight.requires_grad_(True)
        for step in range(steps):
            with score.watching():
                loss_of(base, toy_batch(seed * 1000 + step)).backward()
            score.after_backward(masks)
            now = torch.zeros_like(exact)
            for projection, axis in projections:
                assert projection.weight.grad is not None
                units = (projection.weight.grad * projection.weight).abs().sum(dim=1 - axis).detach()
                now += units / units.norm()
                projection.weight.grad = None
            exact = now if step == 0 else 0.9 * exact + 0.1 * now
            optimiser.step()
            optimiser.zero_grad()
        for projection, _ in projections:
            projection.weight.requires_grad_(False)
    return spearman(score.importance[0].channels, exact)


def test_a_higher_rank_comes_nearer_to_the_exact_score(tmp_path: Path) -> None:
    """On a toy whose inputs have heavy-tailed scales, as acceptance asks; salience measures something else besides."""
    model = HEAVY.model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layernorm" in name:
                value.copy_(torch.exp(1.5 * torch.randn(value.shape, generator=generator)))
    model.save_pretrained(tmp_path / "heavy")
    base = BaseModel(Checkpoint.open(tmp_path / "heavy"), "classification", 3)
    means = {
        (name, rank): sum(correlation(base, name, rank, seed) for seed in range(3)) / 3
        for name, rank in (("lora", 4), ("lora", 32), ("salience", 4))
    }
    assert 0.7 < means["lora", 4] < means["lora", 32] - 0.02
    assert means["salience", 4] > 0.3
