from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import pytest
import torch
from families import Recipe, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from small_splits import LLAMA, NO_CLIPPING, leaves, moved, random_batch, split_model
from sums import digest
from torch import Tensor
from torch.nn import functional

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.data.batches import IGNORED
from spinecli.data.config import Task
from spinecli.federation.split.messages import FeatureBatch, unpadded
from spinecli.federation.split.model import SplitModel
from spinecli.federation.split.server import MergedTop, TopsApart, UnusableFeaturesError, merged_batch
from spinecli.lora.aggregation.averaging import average_tensors

Opened = Callable[[Recipe], Checkpoint]

TASKS: list[Task] = ["classification", "language"]
FAMILY_TASKS: list[tuple[str, Task]] = [
    ("llama", "classification"),
    ("llama", "language"),
    ("opt", "classification"),
    ("bert", "classification"),
]
both_tasks = pytest.mark.parametrize("task", TASKS)
both_tops = pytest.mark.parametrize("kind", [MergedTop, TopsApart])

DEVICES = {"one": [5, 2, 7], "two": [11], "three": [3, 3, 4, 9, 2]}
DEVICE_ROWS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.lists(st.integers(2, 9), min_size=1, max_size=5), min_size=1, max_size=4
)


def feature_batches(
    model: SplitModel, lengths: Mapping[str, Sequence[int]], seed: int = 0, prompts: int = 0
) -> dict[str, FeatureBatch]:
    """What devices send; the first `prompts` tokens of each row are not learned."""
    sent = {}
    for number, (device, own) in enumerate(lengths.items()):
        batch = random_batch(own, task=model.task, seed=seed + number)
        labels = batch.labels.clone()
        if model.task == "language":
            labels[:, :prompts] = IGNORED
        with torch.no_grad():
            hidden = model.features(moved(model.bottom_start, seed=number), batch)
        hidden = hidden * batch.attention_mask[..., None]
        sent[device] = FeatureBatch(hidden, batch.attention_mask, labels)
    return sent


def own_gradient(model: SplitModel, top: Mapping[str, Tensor], batch: FeatureBatch) -> tuple[float, Tensor]:
    """Loss of one device's rows alone, and its gradient, (tokens, d_model)."""
    hidden = batch.hidden.clone().requires_grad_(True)
    loss = functional.cross_entropy(*model.answers(top, hidden, batch.attention_mask, batch.labels))
    loss.backward()
    return float(loss.detach()), unpadded(hidden.grad, batch.attention_mask)


@both_tops
@pytest.mark.parametrize(("family", "task"), FAMILY_TASKS)
def test_a_device_receives_the_gradient_of_its_own_mean_loss(
    opened: Opened, task: Task, kind: type[MergedTop] | type[TopsApart], family: str
) -> None:
    model = split_model(opened(recipe(family)), 1, task=task)
    start = moved(model.top_start)

    @settings(max_examples=10)
    @given(DEVICE_ROWS, st.integers(0, 99), st.integers(0, 1))
    def holds(lengths: dict[str, list[int]], seed: int, prompts: int) -> None:
        batches = feature_batches(model, lengths, seed, prompts)
        top = kind(model, start, "sgd", NO_CLIPPING)
        top.begin(0.1, list(lengths))
        loss, gradients = top.step(batches)
        alone = {device: own_gradient(model, start, batch) for device, batch in batches.items()}
        for device, (_, expected) in alone.items():
            torch.testing.assert_close(gradients[device], expected, atol=1e-6, rtol=1e-4)
            assert expected.abs().max() > 0
            assert not batches[device].hidden.requires_grad  # what devices sent is left as it came
        answers = {device: batch.answers for device, batch in batches.items()}
        mean = sum(own * answers[device] for device, (own, _) in alone.items()) / sum(answers.values())
        assert loss == pytest.approx(mean, abs=1e-5)

    holds()


@both_tasks
def test_the_factor_is_all_answers_over_ones_own(opened: Opened, task: Task) -> None:
    """D_S / d_i, with answers counted: rows of a classifier, learned tokens of a language model."""
    model = split_model(opened(LLAMA), 1, task=task)
    batches = feature_batches(model, DEVICES)
    merged = merged_batch(list(batches.values()))
    _, whole = own_gradient(model, model.top_start, merged)
    top = MergedTop(model, model.top_start, "sgd", NO_CLIPPING)
    top.begin(0.1, list(batches))
    _, gradients = top.step(batches)
    slices = torch.split(whole, [int(batch.attention_mask.sum()) for batch in batches.values()])
    answers = {device: len(own) if task == "classification" else sum(own) - len(own) for device, own in DEVICES.items()}
    for part, device in zip(slices, batches, strict=True):
        factor = sum(answers.values()) / answers[device]
        torch.testing.assert_close(gradients[device], part * factor, atol=1e-7, rtol=1e-5)


@both_tasks
def test_the_merged_top_takes_one_step_on_the_merged_batch(opened: Opened, task: Task) -> None:
    model = split_model(opened(LLAMA), 1, task=task)
    start, batches = moved(model.top_start), feature_batches(model, DEVICES)
    top = MergedTop(model, start, "sgd", NO_CLIPPING)
    top.begin(0.1, list(batches))
    top.step(batches)
    own, merged = leaves(start), merged_batch(list(batches.values()))
    functional.cross_entropy(*model.answers(own, merged.hidden, merged.attention_mask, merged.labels)).backward()
    for name, value in own.items():
        torch.testing.assert_close(top.trained[name], value - 0.1 * value.grad, atol=1e-6, rtol=1e-5)
    assert digest(top.trained) != digest(start)


def test_the_order_of_devices_does_not_matter(opened: Opened) -> None:
    model = split_model(opened(LLAMA), 1)
    batches = feature_batches(model, DEVICES)
    found = []
    for order in (list(batches), list(batches)[::-1]):
        top = MergedTop(model, model.top_start, "sgd", NO_CLIPPING)
        top.begin(0.1, order)
        found.append((top.step({device: batches[device] for device in order}), top.trained))
    (one, first), (other, second) = found
    assert one[0] == pytest.approx(other[0], abs=1e-6)
    for device in batches:
        torch.testing.assert_close(one[1][device], other[1][device], atol=1e-6, rtol=1e-4)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-4)


@both_tops
def test_gradients_are_cut_to_the_norm(opened: Opened, kind: type[MergedTop] | type[TopsApart]) -> None:
    model = split_model(opened(LLAMA), 1)
    batches = feature_batches(model, {"one": [5, 2, 7]})
    norms = []
    for clip in (1e-3, NO_CLIPPING):
        top = kind(model, model.top_start, "sgd", clip)
        top.begin(1.0, ["one"])
        top.step(batches)
        top.end({"one": 1.0})
        norms.append(
            float(
                torch.cat([(top.trained[name] - value).flatten() for name, value in model.top_start.items()])
                .detach()
                .norm()
            )
        )
    assert norms[0] == pytest.approx(1e-3, rel=1e-2)
    assert norms[1] > 1e-2


def test_apart_every_top_sees_its_own_device_only(opened: Opened) -> None:
    model = split_model(opened(LLAMA), 1)
    start, batches = moved(model.top_start), feature_batches(model, DEVICES)
    weights = {"one": 3.0, "three": 5.0}
    top = TopsApart(model, start, "sgd", NO_CLIPPING)
    top.begin(0.1, list(batches))
    for _ in range(2):
        top.step(batches)
    top.end(weights)
    alone = {}
    for device in batches:
        own = {name: value.clone() for name, value in start.items()}
        for _ in range(2):
            own, batch = leaves(own), batches[device]
            functional.cross_entropy(*model.answers(own, batch.hidden, batch.attention_mask, batch.labels)).backward()
            own = {name: (value - 0.1 * value.grad).detach() for name, value in own.items()}
        alone[device] = own
    for name, value in top.trained.items():
        expected = (3 * alone["one"][name] + 5 * alone["three"][name]) / 8
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        assert not value.requires_grad


def test_apart_with_nobody_left_the_top_stays(opened: Opened) -> None:
    model = split_model(opened(LLAMA), 1)
    top, batches = TopsApart(model, model.top_start, "sgd", 1.0), feature_batches(model, DEVICES)
    top.begin(0.1, list(batches))
    top.step(batches)
    top.end({})
    assert digest(top.tensors()) == digest(model.top_start)


@both_tops
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_top_that_is_kept_and_restored_goes_on_the_same(
    opened: Opened, kind: type[MergedTop] | type[TopsApart], optimizer: Literal["sgd", "adamw"]
) -> None:
    model = split_model(opened(LLAMA), 1)
    batches = feature_batches(model, DEVICES)

    def rounds(top: MergedTop | TopsApart, count: int) -> None:
        for _ in range(count):
            top.begin(0.01, list(batches))
            top.step(batches)
            top.end(dict.fromkeys(batches, 1.0))

    top = kind(model, model.top_start, optimizer, 1.0)
    rounds(top, 2)
    kept = top.tensors()
    before = digest(kept)
    rounds(top, 2)
    assert digest(kept) == before  # what was kept does not move on with the top
    other = kind(model, model.top_start, optimizer, 1.0)
    other.restore(kept)
    assert digest(other.tensors()) == before
    rounds(other, 2)
    assert digest(other.tensors()) == digest(top.tensors())
    assert digest(kept) == before


@both_tops
@pytest.mark.parametrize("spoiled", [torch.inf, torch.nan, 3e38])
def test_features_that_make_no_numbers_train_nothing_and_are_named(
    opened: Opened, kind: type[MergedTop] | type[TopsApart], spoiled: float
) -> None:
    model = split_model(opened(recipe("opt")), 1)
    batches = feature_batches(model, DEVICES)
    wild = batches["two"]
    hidden = torch.full_like(wild.hidden, spoiled)
    hidden[..., ::2] *= -1
    top = kind(model, model.top_start, "sgd", 1.0)
    top.begin(0.1, list(batches))
    with pytest.raises(UnusableFeaturesError) as raised:
        top.step({**batches, "two": FeatureBatch(hidden, wild.attention_mask, wild.labels)})
    assert raised.value.devices == ["two"]
    others = {device: batch for device, batch in batches.items() if device != "two"}
    top.step(others)
    top.end({"one": 1.0})
    clean = kind(model, model.top_start, "sgd", 1.0)
    clean.begin(0.1, list(batches))
    clean.step(others)
    clean.end({"one": 1.0})
    assert digest(top.tensors()) == digest(clean.tensors())


@both_tops
def test_where_the_top_itself_has_diverged_nobody_is_blamed(
    opened: Opened, kind: type[MergedTop] | type[TopsApart]
) -> None:
    model = split_model(opened(LLAMA), 1)
    broken = {name: torch.full_like(value, torch.nan) for name, value in model.top_start.items()}
    top, batches = kind(model, broken, "sgd", 1.0), feature_batches(model, DEVICES)
    top.begin(0.1, list(batches))
    with pytest.raises(UnusableFeaturesError) as raised:
        top.step(batches)
    assert raised.value.devices == []


@both_tasks
def test_merged_rows_are_padded_to_the_longest_of_all(opened: Opened, task: Task) -> None:
    model = split_model(opened(LLAMA), 1, task=task)
    batches = list(feature_batches(model, DEVICES).values())
    merged = merged_batch(batches)
    assert merged.rows == 9
    assert merged.hidden.shape == (9, 11, 32)
    assert merged.attention_mask.sum(dim=1).tolist() == [length for own in DEVICES.values() for length in own]
    assert merged.answers == sum(batch.answers for batch in batches)
    assert torch.equal(
        unpadded(merged.hidden, merged.attention_mask),
        torch.cat([unpadded(batch.hidden, batch.attention_mask) for batch in batches]),
    )
    if task == "language":
        assert bool((merged.labels[merged.attention_mask == 0] == IGNORED).all())
    assert [batch.hidden.shape[1] for batch in batches] == [7, 11, 9]


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 50)), min_size=1, max_size=6),
    st.floats(0.1, 10),
)
def test_the_mean_is_weighted_and_knows_only_shares(parts: list[tuple[float, int]], factor: float) -> None:
    tensors = [{"w": torch.full((2, 3), value), "v": torch.tensor([value, 1.0])} for value, _ in parts]
    weights = [float(weight) for _, weight in parts]
    mean = average_tensors(tensors, weights)
    expected = sum(value * weight for value, weight in parts) / sum(weights)
    torch.testing.assert_close(mean["w"], torch.full((2, 3), expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean["v"], torch.tensor([expected, 1.0]), atol=1e-5, rtol=1e-5)
    scaled = average_tensors(tensors, [factor * weight for weight in weights])
    torch.testing.assert_close(scaled["w"], mean["w"], atol=1e-5, rtol=1e-5)
