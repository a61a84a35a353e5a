from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import HIDDEN, LABELS, recipe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_classifier import NAMES, plain_loop, sentences, write_classifier, write_sentences
from transformers import AutoModelForSequenceClassification

from spinecli.artifacts.manifest import MANIFEST_NAME, Manifest, Source, Step
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.errors import OptionError
from spinecli.evaluation.config import (
    EvaluateConfig,
    GenerationConfig,
    LabelledConfig,
    PerplexityConfig,
    TaskConfig,
)
from spinecli.evaluation.memory import measure_memory
from spinecli.evaluation.models import dense_reference, label_names, load_model, open_subjects, weights_of
from spinecli.evaluation.session import open_session
from spinecli.lora.factors import Factors
from spinecli.lora.peft_format import save_adapter

ROWS = sentences(40, seed=3)


def _federated_adapter(directory: Path, family: str, blocks: int = 3) -> Path:
    """What fed-launch writes for a checkpoint without a classifier."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    if family == "llama":
        place, modules = "model.layers.{}.self_attn.q_proj", ["score"]
        head = {"score.weight": drawn(LABELS, HIDDEN)}
    else:
        place, modules = "bert.encoder.layer.{}.attention.self.query", ["bert.pooler.dense", "classifier"]
        shapes = {"bert.pooler.dense": (HIDDEN, HIDDEN), "classifier": (LABELS, HIDDEN)}
        head = {f"{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        head |= {f"{name}.bias": drawn(shape[0]) for name, shape in shapes.items()}
    factors = {place.format(index): Factors(drawn(2, HIDDEN), drawn(HIDDEN, 2)) for index in range(blocks)}
    directory.mkdir()
    save_adapter(directory, factors, head, modules, "base", "SEQ_CLS")
    (directory / MANIFEST_NAME).write_text("{}")
    return directory


@pytest.mark.parametrize(("family", "task"), [("llama", "causal-lm"), ("bert", "masked-lm"), ("bert", "encoding")])
def test_an_adapter_brings_the_head_that_its_base_lacks(family: str, task: str, tmp_path: Path) -> None:
    base = recipe(family, task=task).write(tmp_path / "base")
    adapter = _federated_adapter(tmp_path / "fed", family)
    data = write_sentences(tmp_path / "trees.csv", ROWS)
    (subject,) = open_subjects([(str(base), adapter)])
    assert label_names(subject.checkpoint) == ("LABEL_0", "LABEL_1", "LABEL_2")
    config = EvaluateConfig(model=str(base), adapter=adapter, labelled=LabelledConfig(data=str(data)))
    found = open_session(config).measure().models[0].classification
    assert found is not None

    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=LABELS, pad_token_id=0)
    parameters = plain.num_parameters()
    accuracy, loss = plain_loop(base, ROWS, 128, PeftModel.from_pretrained(plain, str(adapter)))
    assert 0 < accuracy < 1
    assert (found.accuracy, found.nll) == (pytest.approx(accuracy), pytest.approx(loss, rel=1e-4))
    assert found.matched_by == "position"

    weights = weights_of(subject)
    assert weights.parameters == parameters
    assert weights.adapter_parameters == 3 * 2 * 2 * HIDDEN


def test_an_adapter_of_a_named_classifier_keeps_its_names(tmp_path: Path) -> None:
    base = write_classifier(tmp_path / "base", names=NAMES[::-1])
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config).save_pretrained(tmp_path / "lora")
    plain, adapted = open_subjects([(str(base), None), (str(base), tmp_path / "lora")])
    assert label_names(adapted.checkpoint) == NAMES[::-1]
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = load_model(plain, device="cpu", dtype="float32")(tokens).logits
        after = load_model(adapted, device="cpu", dtype="float32")(tokens).logits
    assert float((before - after).abs().max()) > 1e-3
    # a federated adapter counts labels as its own training data does
    (tmp_path / "lora" / MANIFEST_NAME).write_text("{}")
    (federated,) = open_subjects([(str(base), tmp_path / "lora")])
    assert label_names(federated.checkpoint) == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_an_adapter_without_a_part_of_the_head_is_refused(tmp_path: Path) -> None:
    base = recipe("bert").write(tmp_path / "base")
    adapter = _federated_adapter(tmp_path / "fed", "bert")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)

    def without(part: str) -> None:
        save_file({name: value for name, value in tensors.items() if part not in name}, weights)

    without("pooler")
    with pytest.raises(
        OptionError, match=r"does not fit .*base \(neither the checkpoint nor fine-tuning has bert.pool"
    ):
        open_subjects([(str(base), adapter)])
    without("classifier")
    with pytest.raises(OptionError, match="neither of them has a classifier"):
        open_subjects([(str(base), adapter)])


def test_an_adapter_of_another_depth_does_not_fit(tmp_path: Path) -> None:
    base = recipe("llama").write(tmp_path / "base")
    (subject,) = open_subjects([(str(base), _federated_adapter(tmp_path / "fed", "llama", blocks=2))])
    load_model(subject, device="cpu", dtype="float32")
    (subject,) = open_subjects([(str(base), _federated_adapter(tmp_path / "deeper", "llama", blocks=4))])
    with pytest.raises(OptionError, match="does not fit"):
        load_model(subject, device="cpu", dtype="float32")


def test_models_of_two_kinds_are_refused(dense: Path, tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model")
    with pytest.raises(OptionError, match="model is a classifier and dense is a language model"):
        open_subjects([(str(dense), None), (str(model), None)])


def test_measures_of_the_other_kind_are_refused(dense: Path, tmp_path: Path) -> None:
    classifier = str(write_classifier(tmp_path / "model"))
    for config, sentence in (
        (
            EvaluateConfig(model=classifier, perplexity=PerplexityConfig(texts=("x",))),
            "--perplexity measures language models",
        ),
        (
            EvaluateConfig(model=classifier, tasks=TaskConfig(names=("tiny_cloze",))),
            "--tasks measures language models and model is a cl",
        ),
        (
            EvaluateConfig(model=str(dense), labelled=LabelledConfig(data="x")),
            "--labelled measures classifiers and dense is",
        ),
    ):
        with pytest.raises(OptionError, match=sentence):
            open_session(config)


def test_the_memory_of_a_classifier(tmp_path: Path) -> None:
    (subject,) = open_subjects([(str(write_classifier(tmp_path / "model", "bert")), None)])
    generation = GenerationConfig(prompt_length=8, batch_size=2, new_tokens=0)
    found = measure_memory(
        subject, EvaluateConfig(model=subject.reference, memory=True, threads=1, generation=generation)
    )
    assert found.peak_bytes == found.before_loading_bytes + found.added_bytes > 50e6


def _written_by_spine(directory: Path, kind: str, lineage: list[tuple[str, str]]) -> Path:
    steps = [Step(kind=each, command="", reference=name, digest="", summary="") for each, name in lineage]
    Manifest.model_validate(
        {
            "kind": kind,
            "command": "",
            "parameters": {},
            "seed": 0,
            "inputs": {"model": Source(reference="x", files={})},
            "outputs": {},
            "lineage": steps,
            "summary": "",
            "report": {},
            "measured": Stopwatch().measured(),
        }
    ).write(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "lineage", "reference"),
    [
        ("joined-checkpoint", [("dense-checkpoint", "builtin:tiny")], None),
        ("pruned-checkpoint", [("dense-checkpoint", "classifier/")], "classifier/"),
        ("pruned-checkpoint", [("dense-checkpoint", "builtin:tiny"), ("joined-checkpoint", "joined/")], "joined/"),
    ],
)
def test_the_origin_of_a_classifier_is_a_classifier(
    kind: str, lineage: list[tuple[str, str]], reference: str | None, tmp_path: Path
) -> None:
    model = _written_by_spine(write_classifier(tmp_path / "model"), kind, lineage)
    (subject,) = open_subjects([(str(model), None)])
    assert dense_reference(subject) == reference
