from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.shape import BlockShape
from spinecli.lora.cost import TrainingCosts
from spinecli.lora.factors import target_projections

ROWS, LENGTH, BLOCKS, VOCABULARY, HIDDEN = 3, 24, 3, 100, 64
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama grouped": ("llama", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2}),
    "opt": ("opt", {}),
    "opt post-norm": ("opt", {"do_layer_norm_before": False}),
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "gemma3_text": ("gemma3_text", {"num_key_value_heads": 2}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "phi3": ("phi3", {"num_key_value_heads": 4}),
    "phi3 grouped": ("phi3", {"num_key_value_heads": 2}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "distilbert": ("distilbert", {}),
}
TARGETS = ["all", "attention", "query-value"]
ALL_ONLY = ("gemma3_text", "olmo2", "phi3 grouped", "gpt_neox one after the other", "distilbert")
CASES = [(name, selection) for name in FAMILIES for selection in (TARGETS[:1] if name in ALL_ONLY else TARGETS)]
PLACEMENTS = [(0, 4, 4), (0, 0, 5), (4, 0, 9)]


class Pair(nn.Module):
    """A frozen projection and a trainable LoRA pair beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.add(self.base(hidden), self.b(self.a(hidden)), alpha=2.0)


@dataclass
class Trainable:
    """A tiny model with LoRA, and what its training is counted to cost."""

    model: PreTrainedModel
    blocks: nn.ModuleList
    costs: TrainingCosts
    shapes: list[BlockShape]
    ranks: Sequence[int]
    labels: Tensor

    def loss(self) -> Tensor:
        ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        ids[0, -5:] = mask[0, -5:] = 0
        loss: Tensor = self.model(input_ids=ids, attention_mask=mask, labels=self.labels).loss
        return loss

    def measured_flops(self) -> tuple[int, int]:
        with FlopCounterMode(display=False) as forward:
            loss = self.loss()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        return forward.get_total_flops(), backward.get_total_flops()

    def measured_bytes(self) -> list[int]:
        """Bytes that autograd keeps per block (each storage once, weights not), and behind them."""
        seen = {value.untyped_storage().data_ptr() for value in [*self.model.parameters(), *self.model.buffers()]}
        kept: list[Tensor] = []  # as long as they live, no other tensor takes their address
        found, current = [0] * (BLOCKS + 1), BLOCKS

        def enter(index: int) -> Callable[..., None]:
            def hook(*_: object) -> None:
                nonlocal current
                current = index

            return hook

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                kept.append(value)
                found[current] += storage.nbytes()
            return value

        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(enter(index))
            block.register_forward_hook(enter(BLOCKS))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            self.loss()
        return found


def place(root: nn.Module, name: str, module: nn.Module) -> None:
    holder, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(holder), attribute, module)


def configuration(name: str, attention: str) -> Any:
    family, extra = FAMILIES[name]
    sizes: dict[str, Any] = {"intermediate_size": 160, "head_dim": 16}
    if family == "opt":
        sizes = {"ffn_dim": 160, "word_embed_proj_dim": HIDDEN}
    elif family in ("bert", "roberta", "gpt_neox"):
        sizes = {"intermediate_size": 160}
    elif family == "distilbert":
        sizes = {"hidden_dim": 160}
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
        **extra,
    )
    config._attn_implementation = attention
    return config


def trainable(
    directory: Path,
    name: str,
    ranks: Sequence[int],
    *,
    selection: str = "all",
    attention: str = "eager",
    language: bool = False,
    cut: Callable[[int, BlockShape], BlockShape] = lambda _, shape: shape,
) -> Trainable:
    config = configuration(name, attention)
    automatic = AutoModelForCausalLM if language else AutoModelForSequenceClassification
    model = automatic.from_config(config).eval().requires_grad_(False)
    model.save_pretrained(directory)
    checkpoint = Checkpoint.open(directory)
    family = checkpoint.family
    targets = target_projections(family, selection)
    if language:
        head = VOCABULARY * HIDDEN
    else:
        classifier = model.get_submodule(family.classification_head).requires_grad_(True)
        head = sum(value.numel() for value in classifier.parameters() if value.dim() > 1)
    per_token = language or family.kind == "causal"
    costs = TrainingCosts.of(checkpoint, targets, head, per_token, head_trained=not language)
    shapes = [cut(index, checkpoint.shape) for index in range(BLOCKS)]
    blocks = model.get_submodule(family.blocks)
    for block, shape, rank in zip(blocks, shapes, ranks, strict=True):
        for projection, (d_out, d_in) in costs.layout.projections(shape).items():
            biased = block.get_submodule(projection).bias is not None
            linear = nn.Linear(d_in, d_out, biased).requires_grad_(False)
            place(block, projection, Pair(linear, rank) if rank and projection in targets else linear)
    labels = torch.randint(3, VOCABULARY, (ROWS, LENGTH)) if language else torch.tensor([0, 1, 0])
    return Trainable(model, blocks, costs, shapes, ranks, labels)


def narrower(index: int, shape: BlockShape) -> BlockShape:
    groups = max(1, shape.kv_heads - index)
    return fewer_channels(index, replace(shape, heads=groups * shape.group_size, kv_heads=groups))


def fewer_channels(index: int, shape: BlockShape) -> BlockShape:
    return replace(shape, channels=shape.channels - 32 * index)


@pytest.mark.parametrize(("name", "selection"), CASES)
def test_flops_are_those_that_torch_counts(tmp_path: Path, name: str, selection: str) -> None:
    for ranks in PLACEMENTS:
        subject = trainable(tmp_path / str(ranks), name, ranks, selection=selection)
        step = subject.costs.step(subject.shapes, ranks, ROWS, LENGTH)
        forward, backward = subject.measured_flops()
        assert step.forward_flops == pytest.approx(forward, rel=0.005)
        # an adapter on query and value alone leaves the key of the lowest block without a gradient, which we count
        assert step.backward_flops == pytest.approx(backward, rel=0.005 if selection != "query-value" else 0.05)
        assert step.flops == step.forward_flops + step.backward_flops


@pytest.mark.parametrize("selection", ["gate_proj,down_proj", "o_proj", "down_proj", "q_proj,k_proj,v_proj"])
def test_backward_starts_at_the_first_adapted_projection(tmp_path: Path, selection: str) -> None:
    subject = trainable(tmp_path, "llama grouped", (0, 4, 4), selection=selection)
    step = subject.costs.step(subject.shapes, subject.ranks, ROWS, LENGTH)
    assert step.backward_flops == pytest.approx(subject.measured_flops()[1], rel=1e-6)


def test_flops_of_a_language_model_with_its_frozen_head(tmp_path: Path) -> None:
    subject = trainable(tmp_path, "llama grouped", (0, 4, 4), language=True)
    step = subject.costs.step(subject.shapes, subject.ranks, ROWS, LENGTH)
    assert (step.forward_flops, step.backward_flops) == pytest.approx(subject.measured_flops(), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama grouped"])
def test_blocks_may_be_cut_differently(tmp_path: Path, name: str) -> None:
    subject = trainable(tmp_path / "eager", name, (0, 4, 2), cut=narrower)
    step = subject.costs.step(subject.shapes, subject.ranks, ROWS, LENGTH)
    assert (step.forward_flops, step.backward_flops) == pytest.approx(subject.measured_flops(), rel=1e-6)
    fused = trainable(tmp_path / "sdpa", name, (0, 4, 2), cut=narrower, attention="sdpa")
    saved = fused.costs.saved_values(fused.shapes, fused.ranks, ROWS, LENGTH)
    assert [4 * values for values in saved] == pytest.approx(fused.measured_bytes()[:BLOCKS], rel=0.1)


@pytest.mark.parametrize(("name", "selection"), CASES)
def test_saved_bytes_are_those_that_autograd_keeps(tmp_path: Path, name: str, selection: str) -> None:
    for ranks in PLACEMENTS:
        subject = trainable(tmp_path / str(ranks), name, ranks, selection=selection, attention="sdpa")
        saved = subject.costs.saved_values(subject.shapes, ranks, ROWS, LENGTH)
        measured = subject.measured_bytes()[:BLOCKS]
        lowest = next(index for index, rank in enumerate(ranks) if rank)
        assert all((bytes_kept == 0) == (index < lowest) for index, bytes_kept in enumerate(measured))
        assert [4 * values for values in saved] == pytest.approx(measured, rel=0.1)


# DistilBERT's classifier has a hidden layer outside its head, which is not counted.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"distilbert"}))
def test_memory_is_what_the_model_holds(tmp_path: Path, name: str) -> None:
    subject = trainable(tmp_path, name, (0, 4, 4), attention="sdpa")
    memory = subject.costs.memory(subject.shapes, subject.ranks, ROWS, LENGTH, bytes_per_weight=4)
    frozen = sum(value.nbytes for value in subject.model.parameters() if not value.requires_grad)
    trained = sum(value.nbytes for value in subject.model.parameters() if value.requires_grad)
    assert memory.weights == frozen
    assert memory.optimiser == pytest.approx(4 * trained, rel=0.02)  # a head's bias is not counted
    assert memory.activations == pytest.approx(sum(subject.measured_bytes()), rel=0.2)
    assert memory.total == memory.weights + memory.activations + memory.optimiser


def test_memory_of_cut_blocks_and_of_a_tied_head(tmp_path: Path) -> None:
    subject = trainable(tmp_path, "opt", (2, 2, 2), language=True, cut=fewer_channels, attention="sdpa")
    memory = subject.costs.memory(subject.shapes, subject.ranks, ROWS, LENGTH, bytes_per_weight=4)
    frozen = sum(value.nbytes for value in subject.model.parameters() if not value.requires_grad)
    assert memory.weights == frozen
    assert memory.activations == pytest.approx(sum(subject.measured_bytes()), rel=0.2)


def test_adapter_parameters_are_those_of_the_pairs(tmp_path: Path) -> None:
    subject = trainable(tmp_path, "llama grouped", (0, 4, 2), cut=narrower)
    pairs = [value for name, value in subject.model.named_parameters() if name.endswith((".a.weight", ".b.weight"))]
    counted = subject.costs.adapter_parameters(subject.shapes, subject.ranks)
    assert counted == sum(value.numel() for value in pairs) > 0
    assert subject.costs.adapter_bytes(subject.shapes, subject.ranks) == sum(value.nbytes for value in pairs)
    assert subject.costs.adapter_bytes(subject.shapes, subject.ranks, bytes_per_value=2) == 2 * counted


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trainable:
    return trainable(tmp_path_factory.mktemp("llama"), "llama grouped", (1, 1, 1))


ranks_of_blocks = st.tuples(*[st.integers(0, 16)] * BLOCKS)


@given(ranks_of_blocks, st.integers(0, BLOCKS - 1), st.integers(1, 40), st.integers(1, 8))
def test_more_rank_never_costs_less(
    llama: Trainable, ranks: tuple[int, ...], raised: int, length: int, rows: int
) -> None:
    more = tuple(rank + (index == raised) for index, rank in enumerate(ranks))
    costs, shapes = llama.costs, llama.shapes
    low, high = (costs.step(shapes, chosen, rows, length) for chosen in (ranks, more))
    assert low.forward_flops < high.forward_flops
    assert low.backward_flops < high.backward_flops
    low_memory, high_memory = (costs.memory(shapes, chosen, rows, length, 2) for chosen in (ranks, more))
    assert low_memory.weights == high_memory.weights
    assert low_memory.activations < high_memory.activations
    assert low_memory.optimiser < high_memory.optimiser


@given(ranks_of_blocks, st.integers(1, 40))
def test_nothing_is_kept_or_sent_back_below_the_lowest_lora_block(
    llama: Trainable, ranks: tuple[int, ...], length: int
) -> None:
    lowest = next((index for index, rank in enumerate(ranks) if rank), BLOCKS)
    saved = llama.costs.saved_values(llama.shapes, ranks, 2, length)
    assert [values > 0 for values in saved] == [index >= lowest for index in range(BLOCKS)]
    wider = [replace(shape, channels=999) if index < lowest else shape for index, shape in enumerate(llama.shapes)]
    assert (
        llama.costs.step(wider, ranks, 2, length).backward_flops
        == llama.costs.step(llama.shapes, ranks, 2, length).backward_flops
    )


@given(ranks_of_blocks, st.integers(1, 40), st.integers(1, 8))
def test_costs_are_in_proportion_to_the_rows(llama: Trainable, ranks: tuple[int, ...], length: int, rows: int) -> None:
    one, many = (llama.costs.step(llama.shapes, ranks, count, length) for count in (1, rows))
    assert many.forward_flops == rows * one.forward_flops
    assert many.backward_flops == rows * one.backward_flops


def test_one_shape_and_one_rank_per_block(llama: Trainable) -> None:
    with pytest.raises(ValueError, match="zip"):
        llama.costs.step(llama.shapes, (1, 1), 2, 8)
