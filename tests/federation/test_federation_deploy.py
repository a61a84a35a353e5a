"""What a run publishes, opened by others: the adapter by plain PEFT, the deployed checkpoints by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VARIANTS, Recipe, classifier, recipe
from peft import PeftModel
from small_federations import LABELS, LLAMA, Watched, labelled_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from spinecli.artifacts.directory import OutputOptions
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.data.batches import collate
from spinecli.federation import launch as launching
from spinecli.federation.launch import launch
from spinecli.federation.results import FederatedResult
from spinecli.federation.run import DEPLOYED_DIRECTORY, MASKS_DIRECTORY
from spinecli.lora.aggregation.contribution import restricted


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr(launching, "can_plot", lambda: False)


def language(folder: Path) -> dict[str, Any]:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in labelled_rows(60)))
    return {"data": str(path)}


PUBLISHED: dict[str, tuple[Recipe, str]] = {
    "llama classifier": (LLAMA, "classification"),
    "llama language model": (LLAMA, "language"),
    "bert": (classifier("bert"), "classification"),
    "roberta bare": (VARIANTS["roberta bare"], "classification"),
    "opt language model": (recipe("opt", tied=True), "language"),
    "phi3 language model": (VARIANTS["phi3"], "language"),
    "distilbert": (VARIANTS["distilbert"], "classification"),
}


@pytest.mark.parametrize("strategy", ["flora", "legend"])
@pytest.mark.parametrize(("made", "task"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_plain_peft_answers_with_the_published_adapter_as_the_run_did(
    requests: Any, tmp_path: Path, made: Recipe, task: str, strategy: str
) -> None:
    data = language(tmp_path) if task == "language" else {}
    request = requests(made, strategy=strategy, rounds=2, **data)
    launch(request, OutputOptions(tmp_path / "out"))
    watched = Watched(request)
    watched.go_on(2)
    base, model = watched.federation.base, watched.federation.strategy.model()
    inputs = collate(request.evaluation, list(range(4))).model_inputs()
    with torch.no_grad(), base.lent(model.head):
        base.attach(model.adapter, trainable=False)
        expected = base.model(**inputs).logits
    torch.manual_seed(5)
    if task == "classification":
        plain = AutoModelForSequenceClassification.from_pretrained(
            request.config.model, num_labels=len(LABELS), ignore_mismatched_sizes=True
        )
    else:
        plain = AutoModelForCausalLM.from_pretrained(request.config.model)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    adapted = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == model.adapter.keys() == base.target_shapes().keys()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


DEPLOYED: dict[str, tuple[Recipe, str]] = {
    **PUBLISHED,
    "qwen2": (recipe("qwen2", grouped=True, tied=True), "classification"),
}


@pytest.mark.parametrize(("made", "task"), DEPLOYED.values(), ids=DEPLOYED.keys())
def test_deployed_checkpoints_are_plain_ones_that_answer_as_the_run_did(
    requests: Any, tmp_path: Path, made: Recipe, task: str
) -> None:
    data = language(tmp_path) if task == "language" else {}
    out = tmp_path / "out"
    request = requests(made, strategy="fedspine", rounds=3, sparsity=0.3, deploy=True, **data)
    result = FederatedResult.model_validate(launch(request, OutputOptions(out)).report)
    watched = Watched(request)
    watched.go_on(3)
    base, model = watched.federation.base, watched.federation.strategy.model()
    inputs = collate(request.evaluation, list(range(4))).model_inputs()
    kind = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    assert {path.name for path in (out / DEPLOYED_DIRECTORY).iterdir()} == {"slow", "fast"}
    for served in model.served:
        assert served.masks is not None
        place = out / DEPLOYED_DIRECTORY / served.group
        plain, problems = kind.from_pretrained(place, output_loading_info=True)
        assert not any(problems.values())
        with torch.no_grad(), base.lent(model.head, served.masks):
            rows, columns = base.kept_units(served.masks)
            narrow = {name: restricted(each, rows.get(name), columns.get(name)) for name, each in model.adapter.items()}
            base.attach(narrow, trainable=False)
            expected = base.model(**inputs).logits
            torch.testing.assert_close(plain.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        if task == "classification":
            assert plain.config.id2label == dict(enumerate(LABELS))
        opened = Checkpoint.open(place)
        assert opened.shape == served.masks.uniform_shape(request.checkpoint.shape)
        assert opened.blocks == request.checkpoint.blocks
    assert all(group.ratio > 0.2 for group in result.groups)


def test_without_pruning_one_checkpoint_serves_all(requests: Any, tmp_path: Path) -> None:
    launch(requests(strategy="fedit", rounds=1, deploy=True), OutputOptions(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out" / DEPLOYED_DIRECTORY).iterdir()] == ["all"]
    assert not (tmp_path / "out" / MASKS_DIRECTORY).exists()
