from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from families import LABELS, VARIANTS, Recipe, classifier, random_tokens, recipe
from sums import digest
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import head_rows
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.data.batches import Batch
from spinecli.errors import OptionError, UnsupportedFamilyError
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.training import loss_of
from spinecli.federation.planning.workload import head_of
from spinecli.lora.aggregation.contribution import embedded
from spinecli.lora.factors import Factors

Opened = Callable[[Recipe], Checkpoint]
ROWS, LENGTH = 3, 12
FAMILIES = {
    "llama grouped": recipe("llama", grouped=True),
    "llama wide heads": VARIANTS["llama wide heads"],
    "qwen2": VARIANTS["qwen2"],
    "qwen3": VARIANTS["qwen3"],
    "opt": VARIANTS["opt"],
    "bert": classifier("bert"),
    "roberta bare": VARIANTS["roberta bare"],
    "phi3": VARIANTS["phi3"],
    "gpt_neox": VARIANTS["gpt_neox"],
}


def batch(labels: int = 2, rows: int = ROWS) -> Batch:
    """Rows of which one is padded."""
    tokens = random_tokens(rows, LENGTH)
    mask = torch.ones_like(tokens)
    tokens[0, -4:] = mask[0, -4:] = 0
    return Batch(tokens, mask, torch.arange(rows) % labels, torch.arange(rows))


def random_adapter(base: BaseModel, ranks: Sequence[int], seed: int = 0) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(rank, d_in, generator=generator) / d_in**0.5, torch.randn(d_out, rank, generator=generator) / 4
        )
        for index, rank in enumerate(ranks)
        for relative in base.targets
        for name in [base.projection_name(index, relative)]
        for d_out, d_in in [base.target_shapes()[name]]
        if rank
    }


def random_masks(base: BaseModel, seed: int = 0, among: Masks | None = None, share: float = 0.6) -> Masks:
    """Different units in every block, the same number in all, of those that are left."""
    generator = torch.Generator().manual_seed(seed)
    dense, blocks = base.checkpoint.shape, []
    for index in range(base.checkpoint.blocks):
        groups = torch.ones(dense.kv_heads, dtype=torch.bool)
        channels = torch.ones(dense.channels, dtype=torch.bool)
        if among is not None:
            groups, channels = among.blocks[index].kv_heads(dense), among.blocks[index].channels
        groups = drawn(groups, share, generator) if len(base.cuts.kv_counts) > 1 else groups
        blocks.append(BlockMask(groups.repeat_interleave(dense.group_size), drawn(channels, share, generator)))
    return Masks(tuple(blocks))


def drawn(present: Tensor, share: float, generator: torch.Generator) -> Tensor:
    units = present.nonzero().flatten()
    chosen = units[torch.randperm(len(units), generator=generator)[: max(1, round(share * len(units)))]]
    kept = torch.zeros_like(present)
    kept[chosen] = True
    return kept


def everything(base: BaseModel) -> str:
    """A sum over all that devices share."""
    shared: dict[str, Tensor] = dict(base.model.state_dict())
    for name in base.target_shapes():
        projection = base.model.get_submodule(name)
        assert projection.a is None
        assert projection.b is None
        shared[f"{name}.weight"] = projection.weight
        if projection.bias is not None:
            shared[f"{name}.bias"] = projection.bias
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.model.parameters())
    return digest(shared)


def work(base: BaseModel, seed: int = 0) -> str:
    """A device's round: head, folded change, two cuts, factors, and a step of training."""
    head = {name: value + 0.1 * seed for name, value in base.head().items()}
    masks = random_masks(base, seed)
    ranks = [2] * base.checkpoint.blocks
    with base.lent(head, masks, random_adapter(base, ranks, seed + 1)):
        rows, columns = base.kept_units(masks)
        base.attach(
            {
                name: Factors(
                    factors.a if name not in columns else factors.a[:, columns[name]],
                    factors.b if name not in rows else factors.b[rows[name]],
                )
                for name, factors in random_adapter(base, ranks, seed).items()
            },
            2.0,
        )
        for cut in (None, random_masks(base, seed, masks)):
            if cut is not None:
                base.cut(cut)
            parameters = base.trainable()
            loss_of(base, batch()).backward()
            torch.optim.SGD(parameters, lr=0.1).step()
        return digest(
            {**base.head(), **{name + side: getattr(f, side) for name, f in base.attached().items() for side in "ab"}}
        )


def break_off(base: BaseModel) -> None:
    """An error in the middle of a device's work."""
    with base.lent(base.head(), None, random_adapter(base, [2] * base.checkpoint.blocks)):
        base.attach(random_adapter(base, [3] * base.checkpoint.blocks))
        for parameter in base.trainable():
            parameter.data += 1
        base.cut(random_masks(base))
        raise ZeroDivisionError


@pytest.mark.parametrize("made", FAMILIES.values(), ids=FAMILIES.keys())
def test_lending_leaves_nothing_behind(opened: Opened, made: Recipe) -> None:
    base = BaseModel(opened(made), "classification", 2)
    before = everything(base)
    first = work(base)
    assert everything(base) == before
    with pytest.raises(ZeroDivisionError):
        break_off(base)
    assert everything(base) == before
    assert first == work(base), "the same work must come to the same"


def test_two_devices_in_turn_do_not_influence_one_another(opened: Opened) -> None:
    made = recipe("llama", grouped=True)
    alone = [work(BaseModel(opened(made), "classification", 2), seed) for seed in (1, 2)]
    base = BaseModel(opened(made), "classification", 2)
    assert [work(base, 1), work(base, 2), work(base, 1)] == [*alone, alone[0]]
    assert alone[0] != alone[1]


@pytest.mark.parametrize("task", ["classification", "language"])
def test_lent_bare_it_answers_as_transformers_does(opened: Opened, task: Any) -> None:
    made = classifier("llama", grouped=True) if task == "classification" else recipe("llama", grouped=True)
    checkpoint = opened(made)
    base = BaseModel(checkpoint, task, LABELS)
    kind = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    plain = kind.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    inputs = batch().model_inputs()
    with torch.no_grad(), base.lent(base.head()):
        assert torch.equal(base.model(**inputs).logits, plain(**inputs).logits)


HEADS = {
    "llama": (recipe("llama", grouped=True), ("score",)),
    "opt": (recipe("opt", tied=True), ("score",)),
    "qwen2": (VARIANTS["qwen2"], ("score",)),
    "bert": (VARIANTS["bert masked"], ("classifier", "bert.pooler.dense")),
    "bert bare": (VARIANTS["bert bare"], ("classifier",)),
    "roberta": (VARIANTS["roberta masked"], ("classifier",)),
}


@pytest.mark.parametrize(("made", "modules"), HEADS.values(), ids=HEADS.keys())
def test_a_lacking_head_is_drawn_from_the_seed_alone(opened: Opened, made: Recipe, modules: tuple[str, ...]) -> None:
    heads = []
    for seed, elsewhere in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(elsewhere)
        base = BaseModel(opened(made), "classification", 5, seed=seed)
        assert base.head_modules == modules
        heads.append(base.head())
    assert digest(heads[0]) == digest(heads[1])
    assert digest(heads[0]) != digest(heads[2])
    for name, value in heads[0].items():
        assert value.dtype is torch.float32
        assert bool((value != 0).any()) == name.endswith("weight")


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "roberta"])
def test_a_head_that_is_there_is_kept_if_its_labels_are_as_many(opened: Opened, family: str) -> None:
    checkpoint = opened(classifier(family))
    base = BaseModel(checkpoint, "classification", LABELS)
    assert base.head_modules == (base.family.classification_head,)
    head = base.head()
    assert head
    for name, value in head.items():
        assert torch.equal(value, checkpoint.read(name).float())


@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_a_head_for_other_labels_is_drawn_anew(opened: Opened, family: str) -> None:
    checkpoint = opened(classifier(family))
    heads = []
    for elsewhere in (0, 1):
        torch.manual_seed(elsewhere)
        heads.append(BaseModel(checkpoint, "classification", LABELS - 1, seed=7).head())
    assert digest(heads[0]) == digest(heads[1])
    last = [value for value in heads[0].values() if len(value) == LABELS - 1]
    assert last
    for name, value in heads[0].items():
        if len(value) != LABELS - 1:
            assert torch.equal(value, checkpoint.read(name).float()), "what fits is kept"


def test_a_classifier_is_refused_as_a_language_model(opened: Opened) -> None:
    with pytest.raises(OptionError, match=r"lm_head"):
        BaseModel(opened(classifier("llama")), "language", 0)


def test_the_head_trains_in_float32_on_a_narrow_base(opened: Opened) -> None:
    base = BaseModel(
        opened(recipe("llama", grouped=True)), "classification", 2, compute=ComputeOptions(dtype=torch.bfloat16)
    )
    before = everything(base)
    work(base)
    assert everything(base) == before
    assert base.model.get_submodule("model.norm").weight.dtype is torch.bfloat16
    assert {value.dtype for value in base.head().values()} == {torch.float32}


@pytest.mark.parametrize("made", [recipe("llama", grouped=True), classifier("bert")], ids=["llama", "bert"])
@pytest.mark.parametrize("depth", [1, 2])
def test_below_its_depth_a_device_keeps_no_activation_and_no_gradient(opened: Opened, made: Recipe, depth: int) -> None:
    base = BaseModel(opened(made), "classification", 2)
    blocks = base.checkpoint.blocks
    lowest = blocks - depth
    saved = [0] * (blocks + 1)
    current = blocks

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal current
            current = index

        return hook

    def pack(value: Tensor) -> Tensor:
        saved[current] += 1
        return value

    with ExitStack() as stack:
        stack.enter_context(base.lent(base.head()))
        base.attach(random_adapter(base, [0] * lowest + [3] * depth), 2.0)
        parameters = base.trainable()
        for index, block in enumerate(base.blocks):
            for handle in (block.register_forward_pre_hook(enter(index)), block.register_forward_hook(enter(blocks))):
                stack.callback(handle.remove)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = loss_of(base, batch())
        loss.backward()
        names = {id(value): name for name, value in base.model.named_parameters()}
        trained = [names[id(value)] for value in parameters]
        assert {names[id(value)] for value in base.model.parameters() if value.requires_grad} == set(trained)
        assert {names[id(value)] for value in base.model.parameters() if value.grad is not None} == set(trained)
    assert saved[:lowest] == [0] * lowest
    assert all(saved[lowest:])
    held = {f"{base.family.blocks}.{index}." for index in range(lowest, blocks)}
    outside = [name for name in trained if not any(name.startswith(prefix) for prefix in held)]
    assert all(any(name.startswith(module) for module in base.head_modules) for name in outside)
    assert len(trained) == len(outside) + 2 * depth * len(base.targets)
    assert outside


def masked(base: BaseModel, masks: Masks) -> ExitStack:
    """The dense model in which the units that `masks` removes hand on zeros."""
    stack = ExitStack()
    dense = base.checkpoint.shape
    for index, mask in enumerate(masks.blocks):
        heads = torch.zeros(dense.heads * dense.head_dim)
        heads[head_rows(mask.heads, dense.head_dim)] = 1
        for relative, kept in (
            (base.family.attention.output, heads),
            (base.family.feed_forward.output, mask.channels.float()),
        ):
            handle = base.projection(index, relative).register_forward_pre_hook(
                lambda _, arguments, kept=kept: (arguments[0] * kept,)
            )
            stack.callback(handle.remove)
    return stack


@torch.no_grad()
@pytest.mark.parametrize("made", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_cut_model_answers_as_the_masked_one(opened: Opened, made: Recipe) -> None:
    """With LoRA attached before the first cut, after two cuts, and with the trained factors sent back and attached."""
    base = BaseModel(opened(made), "classification", 2)
    inputs = batch().model_inputs()
    adapter = random_adapter(base, [3] * base.checkpoint.blocks)
    first = random_masks(base, 1)
    second = random_masks(base, 2, first)
    answers = []
    with base.lent(base.head()):
        base.attach(adapter, 2.0)
        whole = base.model(**inputs).logits
        for masks in (first, second):
            base.cut(masks)
            answers.append(base.model(**inputs).logits)
        narrow = base.attached()
    assert float((answers[0] - whole).abs().max()) > 1e-2
    for masks, found in zip((first, second), answers, strict=True):
        with base.lent(base.head()), masked(base, masks):
            base.attach(adapter, 2.0)
            torch.testing.assert_close(found, base.model(**inputs).logits, rtol=1e-5, atol=1e-5)
    rows, columns = base.kept_units(second)
    with base.lent(base.head(), second):
        base.attach(narrow)
        torch.testing.assert_close(base.model(**inputs).logits, answers[1], rtol=1e-5, atol=1e-5)
    shapes = base.target_shapes()
    full = {name: embedded(each, shapes[name], rows.get(name), columns.get(name)) for name, each in narrow.items()}
    with base.lent(base.head()), masked(base, second):
        base.attach(full)
        torch.testing.assert_close(base.model(**inputs).logits, answers[1], rtol=1e-5, atol=1e-5)


def test_a_family_whose_heads_cannot_leave_loses_channels_only(opened: Opened) -> None:
    base = BaseModel(opened(VARIANTS["opt"]), "classification", 2)
    assert base.cuts.kv_counts == (base.checkpoint.shape.kv_heads,)
    for ratio in (0.1, 0.3, 0.6):
        assert base.cuts.widths_at(ratio).kv_heads == base.checkpoint.shape.kv_heads
        assert base.cuts.widths_at(ratio).channels < base.checkpoint.shape.channels


def test_a_family_without_a_classifier_says_so(opened: Opened) -> None:
    checkpoint = opened(VARIANTS["ernie4_5"])
    BaseModel(checkpoint, "language", 0)
    with pytest.raises(UnsupportedFamilyError, match="no classifier"):
        BaseModel(checkpoint, "classification", 2)
    with pytest.raises(UnsupportedFamilyError, match="no classifier"):
        head_of(checkpoint, 2)
