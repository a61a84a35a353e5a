from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Recipe, classifier, random_tokens, recipe
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.federation.client.base_model import BaseModel
from spinecli.lora.factors import Adapter, Factors
from spinecli.lora.peft_format import adapter_config, save_adapter

Opened = Callable[[Recipe], Checkpoint]
LABELS = 2
BASES: dict[str, tuple[Recipe, Any]] = {
    "llama grouped": (recipe("llama", grouped=True, blocks=12, channels=8), "classification"),
    "llama language model": (recipe("llama", grouped=True), "language"),
    "qwen2": (recipe("qwen2", grouped=True, tied=True), "classification"),
    "opt": (recipe("opt", tied=True), "classification"),
    "opt language model": (recipe("opt", tied=True), "language"),
    "bert": (classifier("bert"), "classification"),
    "bert masked": (recipe("bert", tied=True), "classification"),
    "roberta bare": (recipe("roberta", task="encoding"), "classification"),
}


def adapter_of(base: BaseModel, ranks: Mapping[int, int]) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: Factors(
            torch.randn(rank, d_in, generator=generator) / d_in**0.5, torch.randn(d_out, rank, generator=generator) / 4
        )
        for index, rank in ranks.items()
        for relative in base.targets
        for name in [base.projection_name(index, relative)]
        for d_out, d_in in [base.target_shapes()[name]]
    }


def save(directory: Path, base: BaseModel, adapter: Adapter, head: Mapping[str, Tensor], task: str) -> None:
    directory.mkdir(exist_ok=True)
    kind = "SEQ_CLS" if task == "classification" else "CAUSAL_LM"
    save_adapter(directory, adapter, head, base.head_modules, str(base.checkpoint.path), kind)


@pytest.mark.parametrize("ranks", [{0: 4, 1: 4, 2: 4}, {1: 3, 2: 7}, {0: 2, 1: 5, 2: 9}], ids=str)
@pytest.mark.parametrize(("made", "task"), BASES.values(), ids=BASES.keys())
def test_plain_peft_loads_it_with_exactly_its_modules_and_answers_alike(
    opened: Opened, tmp_path: Path, made: Recipe, task: Any, ranks: dict[int, int]
) -> None:
    base = BaseModel(opened(made), task, LABELS)
    adapter = adapter_of(base, ranks)
    head = {name: value + 0.5 for name, value in base.head().items()}
    save(tmp_path, base, adapter, head, task)
    tokens = random_tokens(3, 10)
    with torch.no_grad(), base.lent(head):
        base.attach(adapter, trainable=False)
        expected = base.model(tokens).logits

    torch.manual_seed(1)  # the head that transformers draws must be replaced
    if task == "classification":
        plain = AutoModelForSequenceClassification.from_pretrained(
            base.checkpoint.path, num_labels=LABELS, ignore_mismatched_sizes=True
        )
    else:
        plain = AutoModelForCausalLM.from_pretrained(base.checkpoint.path)
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    adapted = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == adapter.keys()
    for name, factors in adapter.items():
        module: Any = loaded.base_model.model.get_submodule(name)
        assert module.r["default"] == factors.rank
        assert module.scaling["default"] == 1
        assert torch.equal(module.lora_A["default"].weight, factors.a)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selection", ["query-value", "attention", "intermediate.dense", "output.dense"])
def test_targets_that_peft_would_confuse_by_their_endings(opened: Opened, tmp_path: Path, selection: str) -> None:
    """BERT has two projections called `output.dense` when names are compared from their end."""
    base = BaseModel(opened(classifier("bert")), "classification", LABELS, selection)
    adapter = adapter_of(base, {0: 2, 2: 2})
    save(tmp_path, base, adapter, base.head(), "classification")
    plain = AutoModelForSequenceClassification.from_pretrained(
        base.checkpoint.path, num_labels=LABELS, ignore_mismatched_sizes=True
    )
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    adapted = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == adapter.keys()


def test_the_order_of_the_projections_does_not_decide_about_the_bytes(opened: Opened, tmp_path: Path) -> None:
    """A resumed run reads its adapter from a file, in another order."""
    base = BaseModel(opened(recipe("llama", grouped=True)), "classification", LABELS)
    adapter = adapter_of(base, {0: 2, 1: 5, 2: 9})
    found = []
    for place, order in (("one", list(adapter)), ("other", sorted(adapter, reverse=True))):
        save(tmp_path / place, base, {name: adapter[name] for name in order}, base.head(), "classification")
        found.append({path.name: path.read_bytes() for path in (tmp_path / place).iterdir()})
    assert found[0] == found[1]
    assert found[0].keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_commonest_rank_is_the_rank_and_others_are_exceptions() -> None:
    config = adapter_config({"m.0.q": 4, "m.1.q": 4, "m.10.q": 8}, "base", "CAUSAL_LM", ())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"m\.10\.q": 8}
    assert config["modules_to_save"] is None
    assert json.loads(json.dumps(config)) == config


def test_equally_common_ranks_are_decided_in_any_order() -> None:
    one = adapter_config({"m.0.q": 4, "m.1.q": 8}, "base", "CAUSAL_LM", ())
    other = adapter_config({"m.1.q": 8, "m.0.q": 4}, "base", "CAUSAL_LM", ())
    assert one == other
    assert one["r"] == 8
