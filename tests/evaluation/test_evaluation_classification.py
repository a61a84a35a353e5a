from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from tiny_classifier import NAMES, change_config, plain_loop, sentences, write_classifier, write_sentences
from torch import nn

from spinecli.artifacts.context import RunContext
from spinecli.errors import DataError, MeasurementError, OptionError, TokenizerError
from spinecli.evaluation.classification import classification_score
from spinecli.evaluation.config import EvaluateConfig, GenerationConfig, LabelledConfig
from spinecli.evaluation.models import open_subjects
from spinecli.evaluation.results import ClassificationResult, Evaluation
from spinecli.evaluation.session import open_session

ROWS = sentences(70)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("data") / "trees.csv", ROWS)


def _evaluated(*models: Path, notes: list[str] | None = None, **labelled: object) -> Evaluation:
    *others, last = map(str, models)
    asked = LabelledConfig.model_validate(labelled)
    config = EvaluateConfig(model=last, against=tuple(others), labelled=asked, threads=1)
    heard = [] if notes is None else notes
    return open_session(config, RunContext(note=heard.append)).measure()


def _found(model: Path, **labelled: object) -> ClassificationResult:
    found = _evaluated(model, **labelled).models[0].classification
    assert found is not None
    return found


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "roberta", "narrow_bert"])
def test_figures_are_those_of_a_plain_loop(family: str, data: Path, tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model", family)
    found = _found(model, data=str(data), max_length=16)
    accuracy, loss = plain_loop(model, ROWS, 16)
    assert 0 < accuracy < 1
    assert found.accuracy == pytest.approx(accuracy)
    assert found.nll == pytest.approx(loss, rel=1e-4)
    assert (found.examples, found.max_length, found.matched_by) == (70, 16, "name")
    assert 0 < found.shortened < 70


@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_pairs_of_texts(family: str, tmp_path: Path) -> None:
    rows = [(one, other, label) for (one, label), (other, _) in zip(ROWS[:20], ROWS[20:40], strict=True)]
    file = write_sentences(tmp_path / "pairs.csv", rows, ("left", "right", "tree"))
    model = write_classifier(tmp_path / "model", family)
    # as most tokenizers say, whether their model has use for segments or not
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    columns = {"text_column": "left", "pair_column": "right", "label_column": "tree"}
    found = _found(model, data=str(file), **columns)
    accuracy, loss = plain_loop(model, rows, 128)
    assert (found.accuracy, found.nll) == (pytest.approx(accuracy), pytest.approx(loss, rel=1e-4))


def test_rows_of_other_lengths_without_a_padding_token(data: Path, tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model", padding=False)
    found = _found(model, data=str(data))
    accuracy, loss = plain_loop(model, ROWS, 128)
    assert (found.accuracy, found.nll) == (pytest.approx(accuracy), pytest.approx(loss, rel=1e-4))


def test_labels_are_matched_by_name_in_any_order(data: Path, tmp_path: Path) -> None:
    plain = write_classifier(tmp_path / "plain")
    turned = write_classifier(tmp_path / "turned", names=("Cedar", "ash", "birch"))
    tensors = load_file(turned / "model.safetensors")
    tensors["score.weight"] = tensors["score.weight"][[2, 0, 1]].clone()
    save_file(tensors, turned / "model.safetensors", metadata={"format": "pt"})
    first, second = (model.classification for model in _evaluated(plain, turned, data=str(data)).models)
    assert first is not None
    assert second is not None
    assert second.nll == pytest.approx(first.nll, rel=1e-6)
    assert (second.accuracy, second.f1) == (first.accuracy, first.f1)
    assert second.matched_by == "name"


def test_unnamed_outputs_are_matched_by_position_and_that_is_said(data: Path, tmp_path: Path) -> None:
    named, unnamed = write_classifier(tmp_path / "named"), write_classifier(tmp_path / "unnamed", names=None)
    notes: list[str] = []
    found = _evaluated(named, unnamed, data=str(data), notes=notes)
    first, second = (model.classification for model in found.models)
    assert first is not None
    assert second == first.model_copy(update={"matched_by": "position"})
    wanted = "trees.csv and unnamed are matched by position: ash = LABEL_0, birch = LABEL_1, cedar = LABEL_2."
    assert notes == [f"Labels of {wanted}"]


def test_labels_of_another_task_are_refused(data: Path, tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model", names=("good", "bad", "ugly"))
    with pytest.raises(DataError, match=r"trees.csv has 3 labels \(ash, birch, cedar\) and model .*\(good, bad, ugly"):
        _evaluated(model, data=str(data))


def test_a_directory_means_its_validation_part(data: Path, tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model")
    folder = tmp_path / "trees"
    folder.mkdir()
    write_sentences(folder / "train.csv", ROWS[:30])
    with pytest.raises(DataError, match="has no validation, dev or test file"):
        _evaluated(model, data=str(folder))
    write_sentences(folder / "test.csv", ROWS[30:])
    notes: list[str] = []
    found = _evaluated(model, data=str(folder), notes=notes).models[0].classification
    assert found is not None
    assert (found.examples, found.description, found.data) == (40, "trees/test.csv", str(folder))
    assert notes == [f"{folder} is measured on its part trees/test.csv."]
    assert found.accuracy == pytest.approx(plain_loop(model, ROWS[30:], 128)[0])


def test_examples_are_taken_evenly(data: Path, tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model")
    found = _found(model, data=str(data), examples=7)
    assert found.examples == 7
    assert found.nll == pytest.approx(plain_loop(model, ROWS[::10], 128)[1], rel=1e-4)


def test_rows_fit_the_positions_of_the_shortest_model(data: Path, tmp_path: Path) -> None:
    long, short = write_classifier(tmp_path / "long"), write_classifier(tmp_path / "short")
    change_config(short, max_position_embeddings=12)
    notes: list[str] = []
    found = _evaluated(long, short, data=str(data), notes=notes)
    assert found.settings.labelled is not None
    assert found.settings.labelled.max_length == 12
    assert notes[0] == "Rows have at most 12 tokens instead of 128, because short has no more positions."
    with pytest.raises(OptionError, match=r"Rows of 13 tokens exceed the 12 positions of short; lower --max-length"):
        _evaluated(long, short, data=str(data), max_length=13)


def test_speed_of_classifiers_is_that_of_forward_passes(tmp_path: Path) -> None:
    first, second = (write_classifier(tmp_path / name, family) for name, family in (("a", "bert"), ("b", "llama")))
    change_config(second, pad_token_id=None)
    generation = GenerationConfig(prompt_length=10, batch_size=3, repeats=4)
    config = EvaluateConfig(model=str(second), against=(str(first),), latency=True, generation=generation, threads=1)
    found = open_session(config).measure()
    assert Evaluation.model_validate_json(found.model_dump_json()) == found
    assert (found.settings.generation.prompt_length, found.settings.generation.new_tokens) == (10, 0)
    for model in found.models:
        assert model.latency is None
        assert model.forward is not None
        assert len(model.forward.rows.samples) == 4
        assert model.forward.tokens.samples == pytest.approx([10 * rate for rate in model.forward.rows.samples])
    rows = {row.figure: row for row in found.comparison}
    assert rows["forward, rows/s"].ratios == pytest.approx(rows["forward, tokens/s"].ratios)


def test_what_chooses_no_single_label_is_refused(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model")
    change_config(model, problem_type="multi_label_classification")
    with pytest.raises(OptionError, match="does not choose one of several labels"):
        open_subjects([(str(model), None)])


def test_a_padding_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model", padding=False)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 900, "content": "<filler>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<filler>"}))
    with pytest.raises(TokenizerError, match="has the pad_token"):
        open_subjects([(str(model), None)])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_scores_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    answers, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    logits = nn.functional.one_hot(torch.tensor(answers), 4).double()
    found = classification_score(logits, torch.tensor(targets), (2, 0, 3, 1))
    present = sorted(set(targets))
    wanted = f1_score(targets, answers, labels=present, average=None, zero_division=0)
    by_output = dict(zip((2, 0, 3, 1), found.f1, strict=True))
    assert [by_output[output] for output in present] == pytest.approx(list(wanted))
    assert found.macro_f1 == pytest.approx(sum(wanted) / len(wanted))
    right = [answer == target for answer, target in zip(answers, targets, strict=True)]
    assert found.accuracy == pytest.approx(sum(right) / len(right))
    deviation = float(torch.tensor(right).double().std())
    assert found.accuracy_error == pytest.approx(deviation / math.sqrt(len(right)), abs=1e-12)
    assert len(found.f1_by_label((*NAMES, "fir"))) == len(present)


def test_a_loss_that_is_none() -> None:
    with pytest.raises(MeasurementError, match="The loss is nan"):
        classification_score(torch.tensor([[math.nan, 0.0]]).double(), torch.tensor([0]), (0, 1))
