from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import VARIANTS, Recipe, classifier, load, recipe
from hypothesis import given
from hypothesis import strategies as st
from small_splits import LLAMA, leaves, moved, random_batch, split_configs, split_model
from torch.nn import functional

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.data.batches import Batch
from spinecli.data.config import Task
from spinecli.errors import OptionError
from spinecli.federation.config import LoraConfig, SplitConfig
from spinecli.federation.split.messages import FeatureBatch, padded, unpadded
from spinecli.federation.split.model import SplitModel
from spinecli.federation.split.server import merged_batch

Opened = Callable[[Recipe], Checkpoint]

CLASSIFIERS = {
    "llama": LLAMA,
    "llama tied": VARIANTS["llama grouped tied"],
    "llama biases": VARIANTS["llama biases"],
    "mistral": VARIANTS["mistral window"],
    "qwen2": VARIANTS["qwen2 mixed windows"],
    "qwen3": VARIANTS["qwen3 mixed windows"],
    "opt": VARIANTS["opt"],
    "opt projected": VARIANTS["opt post-norm"],
    "bert": VARIANTS["bert"],
    "bert bare": VARIANTS["bert bare"],
    "roberta": VARIANTS["roberta"],
    "narrow bert": VARIANTS["narrow bert"],
    "narrow roberta": VARIANTS["narrow roberta bare"],
    "gemma2": VARIANTS["gemma2"],
    "gpt_neox": VARIANTS["gpt_neox"],
    "distilbert": VARIANTS["distilbert"],
}
LANGUAGE = {name: made for name, made in CLASSIFIERS.items() if "bert" not in name}
CASES: list[tuple[Recipe, Task]] = [
    *((made, "classification") for made in CLASSIFIERS.values()),
    *((made, "language") for made in LANGUAGE.values()),
]
NAMES = [f"{name} classification" for name in CLASSIFIERS] + [f"{name} language" for name in LANGUAGE]
every_family = pytest.mark.parametrize(("made", "task"), CASES, ids=NAMES)
every_way = pytest.mark.parametrize("way", ["lora", "full"])

LENGTHS = ([5, 2, 7], [11, 3], [1, 4, 4])
"""Rows of three devices, each padded to its own longest."""
LANGUAGE_LENGTHS = ([5, 2, 7], [11, 3], [2, 4, 4])


def device_batches(task: Task) -> list[Batch]:
    lengths = LENGTHS if task == "classification" else LANGUAGE_LENGTHS
    return [random_batch(own, task=task, seed=seed) for seed, own in enumerate(lengths)]


def crossed(model: SplitModel, features: Sequence[torch.Tensor], batches: Sequence[Batch]) -> FeatureBatch:
    """What the server makes of the devices' rows: only real tokens cross, and it pads to the longest of all."""
    parts = []
    for hidden, batch in zip(features, batches, strict=True):
        values, mask = padded(unpadded(hidden, batch.attention_mask), batch.attention_mask.sum(dim=1))
        parts.append(FeatureBatch(values, mask, batch.labels))
    return merged_batch(parts)


@every_way
@every_family
def test_top_behind_bottom_answers_as_the_whole_model(opened: Opened, made: Recipe, task: Task, way: str) -> None:
    batches = device_batches(task)
    for cut in range(1, made.blocks):
        model = split_model(opened(made), cut, task=task, bottom=way, top=way)
        bottom, top = moved(model.bottom_start), moved(model.top_start, seed=2)
        features = [model.features(bottom, batch) for batch in batches]
        merged = crossed(model, features, batches)
        found, targets = model.answers(top, merged.hidden, merged.attention_mask, merged.labels)
        alone = [model.joined_answers({**bottom, **top}, batch) for batch in batches]
        torch.testing.assert_close(found, torch.cat([logits for logits, _ in alone]), atol=1e-5, rtol=1e-5)
        assert torch.equal(targets, torch.cat([own for _, own in alone]))
        assert float(found.std()) > 1e-2


@every_way
@every_family
def test_the_gradients_through_the_cut_are_those_of_the_whole_model(
    opened: Opened, made: Recipe, task: Task, way: str
) -> None:
    batch = random_batch([6, 9, 3], task=task)
    for cut in range(1, made.blocks):
        model = split_model(opened(made), cut, task=task, bottom=way, top=way)
        start = moved({**model.bottom_start, **model.top_start})
        bottom = leaves({name: start[name] for name in model.bottom_names})
        top = leaves({name: start[name] for name in model.top_names})
        features = model.features(bottom, batch)
        arrived = features.detach().requires_grad_(True)
        functional.cross_entropy(*model.answers(top, arrived, batch.attention_mask, batch.labels)).backward()
        features.backward(arrived.grad)
        whole = leaves(start)
        functional.cross_entropy(*model.joined_answers(whole, batch)).backward()
        assert {name for name, value in whole.items() if value.grad is not None} == {
            name for name, value in {**bottom, **top}.items() if value.grad is not None
        }
        for name, value in {**bottom, **top}.items():
            torch.testing.assert_close(value.grad, whole[name].grad, atol=1e-5, rtol=1e-4, msg=name)
        assert all(
            any(value.grad is not None and value.grad.any() for value in half.values()) for half in (bottom, top)
        )


PLAIN = [
    *((classifier(family, grouped=True), "classification") for family in ("llama", "mistral", "qwen2", "qwen3")),
    *((classifier(family), "classification") for family in ("opt", "bert", "roberta", "narrow_bert", "narrow_roberta")),
    *((made, "language") for made in LANGUAGE.values()),
]


@every_way
@pytest.mark.parametrize(
    ("made", "task"), PLAIN, ids=[f"{made.family}-{task}-{n}" for n, (made, task) in enumerate(PLAIN)]
)
def test_the_merged_weights_are_the_model_in_plain_transformers(
    opened: Opened, written: Any, made: Recipe, task: Task, way: str
) -> None:
    """The reference of the other tests is itself the model that anybody would run."""
    model = split_model(opened(made), 1, task=task, bottom=way, top=way)
    trained = moved({**model.bottom_start, **model.top_start})
    plain = load(written(made))
    unknown = plain.load_state_dict(model.merged(trained), strict=False).unexpected_keys
    assert unknown == []
    batch = random_batch([6, 9, 3], task=task)
    found, targets = model.joined_answers(trained, batch)
    with torch.no_grad():
        plain.config.pad_token_id = 0
        logits = plain(**batch.model_inputs()).logits
    if task == "language":
        logits = logits[:, :-1][batch.labels[:, 1:] != -100]
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    assert len(targets) == len(logits)


@pytest.mark.parametrize("name", ["llama", "bert", "opt"])
def test_rows_of_any_lengths_cross_the_cut(opened: Opened, name: str) -> None:
    model = split_model(opened(CLASSIFIERS[name]), 2)
    bottom, top = moved(model.bottom_start), moved(model.top_start, seed=2)
    rows = st.lists(st.integers(1, 14), min_size=1, max_size=4)

    @given(st.lists(rows, min_size=1, max_size=3), st.integers(0, 99))
    def holds(lengths: list[list[int]], seed: int) -> None:
        batches = [random_batch(own, seed=seed + number) for number, own in enumerate(lengths)]
        with torch.no_grad():
            merged = crossed(model, [model.features(bottom, batch) for batch in batches], batches)
            found, _ = model.answers(top, merged.hidden, merged.attention_mask, merged.labels)
            alone = torch.cat([model.joined_answers({**bottom, **top}, batch)[0] for batch in batches])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)

    holds()


@pytest.mark.parametrize("pad_id", [0, 1, 7])
def test_a_causal_classifier_finds_the_end_of_a_row_whatever_pads_it(opened: Opened, pad_id: int) -> None:
    split, lora, compute = SplitConfig(), LoraConfig(), ComputeOptions()
    model = SplitModel(opened(LLAMA), "classification", 3, 1, split, lora, pad_id, 0, compute)
    drawn = random_batch([6, 9, 3])
    tokens = drawn.input_ids.masked_fill(drawn.input_ids == pad_id, 11)
    batch = Batch(
        tokens.masked_fill(drawn.attention_mask == 0, pad_id), drawn.attention_mask, drawn.labels, drawn.row_numbers
    )
    top = model.top_start
    features = model.features(model.bottom_start, batch)
    found, _ = model.answers(top, features, batch.attention_mask, batch.labels)
    whole, _ = model.joined_answers({**model.bottom_start, **top}, batch)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


@every_family
def test_every_tensor_is_on_one_side_and_where_it_is_used(opened: Opened, made: Recipe, task: Task) -> None:
    checkpoint = opened(made)
    blocks = f"{checkpoint.family.blocks}."
    for cut in range(1, made.blocks):
        model = split_model(checkpoint, cut, task=task, bottom="full", top="full")
        bottom, top = set(model.bottom_names), set(model.top_names)
        assert not bottom & top
        tied = {
            name
            for name, value in model.model.named_parameters()
            if task == "language" and made.tied and value is model.model.get_input_embeddings().weight
        }
        assert len(tied) == (made.tied and task == "language")
        assert bottom | top == {name for name, _ in model.model.named_parameters()} - tied
        for name in bottom | top:
            if name.startswith(blocks):
                assert (name in bottom) == (int(name.removeprefix(blocks).split(".")[0]) < cut), name
        before = {
            name for name in bottom | top if not name.startswith(blocks) and "embed" in name and "lm_head" not in name
        }
        assert before <= bottom
        assert before or tied
        assert any(name.startswith(tuple(model.head_modules)) for name in top) or task == "language"
        lora = split_model(checkpoint, cut, task=task)
        for name in (*lora.bottom_names, *lora.top_names):
            in_head = name.startswith(tuple(f"{module}." for module in lora.head_modules))
            assert name.endswith((".a", ".b")) or in_head, name
        assert all(name.startswith(blocks) for name in lora.bottom_names)


def test_each_half_may_go_its_own_way(opened: Opened) -> None:
    model = split_model(opened(LLAMA), 1, bottom="full", top="lora")
    assert not any(name.endswith((".a", ".b")) for name in model.bottom_names)
    assert "model.embed_tokens.weight" in model.bottom_names
    assert all(name.endswith((".a", ".b")) or name.startswith("score") for name in model.top_names)
    other = split_model(opened(LLAMA), 1, bottom="lora", top="full")
    assert all(name.endswith((".a", ".b")) for name in other.bottom_names)
    assert {"model.norm.weight", "score.weight"} <= set(other.top_names)
    batch = random_batch([4, 6])
    for made in (model, other):
        bottom, top = moved(made.bottom_start), moved(made.top_start)
        found, _ = made.answers(top, made.features(bottom, batch), batch.attention_mask, batch.labels)
        torch.testing.assert_close(found, made.joined_answers({**bottom, **top}, batch)[0], atol=1e-5, rtol=1e-5)


def test_a_fresh_split_changes_nothing_of_the_checkpoint(opened: Opened, written: Any) -> None:
    """LoRA begins at zero: the first answers are the checkpoint's own."""
    made = classifier("llama", grouped=True)
    model = split_model(opened(made), 1)
    batch = random_batch([5, 8])
    found, _ = model.joined_answers({**model.bottom_start, **model.top_start}, batch)
    with torch.no_grad():
        expected = load(written(made))(**batch.model_inputs()).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_start(opened: Opened) -> None:
    first, again, other = (split_model(opened(LLAMA), 1, seed=seed) for seed in (1, 1, 2))
    for name, value in {**first.bottom_start, **first.top_start}.items():
        assert torch.equal(value, {**again.bottom_start, **again.top_start}[name])
    assert any(not torch.equal(value, other.bottom_start[name]) for name, value in first.bottom_start.items())


def test_a_split_of_some_targets_adapts_only_them(opened: Opened) -> None:
    model = split_model(opened(recipe("qwen3")), 2, targets="query-value")
    assert {name.split(".")[-2] for name in model.bottom_names} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("modes", [{"bottom": "full"}, {"top": "full"}])
def test_all_weights_are_trained_in_float32_only(opened: Opened, modes: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="float32"):
        SplitModel(
            opened(LLAMA), "classification", 3, 1, *split_configs(**modes), 0, 0, ComputeOptions(dtype=torch.bfloat16)
        )


def test_the_features_of_several_batches_wait_for_their_gradients(opened: Opened) -> None:
    """One model in memory serves all devices: the forward pass of one must not disturb the graph of another."""
    model = split_model(opened(LLAMA), 2)
    starts = [moved(model.bottom_start, seed=seed) for seed in (1, 2)]
    batches = [random_batch([4, 7], seed=seed) for seed in (1, 2)]
    alone = []
    for start, batch in zip(starts, batches, strict=True):
        own = leaves(start)
        model.features(own, batch).square().sum().backward()
        alone.append(own)
    together = [leaves(start) for start in starts]
    features = [model.features(own, batch) for own, batch in zip(together, batches, strict=True)]
    for value in features:
        value.square().sum().backward()
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(value.grad, other[name].grad) for name, value in one.items())
