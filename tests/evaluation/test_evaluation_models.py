from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_tiny_checkpoint
from transformers import AutoModelForCausalLM

from spinecli.checkpoints.stream.block_stream import compute_options
from spinecli.errors import (
    DamagedArtifactError,
    ForeignArtifactError,
    MissingPathError,
    NonFiniteWeightsError,
    OptionError,
    UnsafeFileError,
    UnsupportedFamilyError,
)
from spinecli.evaluation.models import (
    default_text,
    dense_reference,
    load_model,
    open_subjects,
    weights_of,
)


def test_counts_are_those_of_the_loaded_model(dense: Path) -> None:
    (subject,) = open_subjects([(str(dense), None)])
    weights, model = weights_of(subject), AutoModelForCausalLM.from_pretrained(dense)
    assert weights.parameters == model.num_parameters()
    assert weights.block_parameters == sum(value.numel() for value in model.model.layers.parameters())
    assert weights.bytes_on_disk == 4 * weights.parameters
    assert weights.adapter_parameters == 0


@pytest.mark.parametrize("task", ["masked-lm", "encoding"])
def test_encoders_that_answer_nothing_are_refused(tmp_path: Path, task: str) -> None:
    from families import recipe

    directory = recipe("bert", task=task).write(tmp_path / "encoder")
    with pytest.raises(UnsupportedFamilyError, match=f"encoder is a {task} checkpoint and gives no output"):
        open_subjects([(str(directory), None)])


def test_labels_are_short_and_unique(dense: Path, thinner: Path, tmp_path: Path) -> None:
    twin = write_tiny_checkpoint(tmp_path / "dense")
    labels = [subject.label for subject in open_subjects([(str(dense), None), (str(thinner), None)])]
    assert labels == ["dense", "thinner"]
    labels = [subject.label for subject in open_subjects([(str(dense), None), (str(twin), None)])]
    assert labels == [str(dense), str(twin)]
    labels = [subject.label for subject in open_subjects([(str(dense), None), (str(dense), None)])]
    assert labels == [str(dense), f"{dense} (2)"]


def test_nan_weights_are_refused(dense: Path, tmp_path: Path) -> None:
    broken = write_tiny_checkpoint(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (subject,) = open_subjects([(str(broken), None)])
    with pytest.raises(NonFiniteWeightsError, match=r"model.layers.1.mlp.up_proj.weight in .*broken"):
        load_model(subject, device="cpu", dtype="float32")


def test_an_adapter_changes_the_model_it_was_made_for(dense: Path, adapter: Path) -> None:
    plain, adapted = open_subjects([(str(dense), None), (str(dense), adapter)])
    assert adapted.label == "dense + adapter"
    stored = load_file(adapter / "adapter_model.safetensors")
    assert weights_of(adapted).adapter_parameters == sum(value.numel() for value in stored.values())
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = load_model(plain, device="cpu", dtype="float32")(tokens).logits
        after = load_model(adapted, device="cpu", dtype="float32")(tokens).logits
    assert float((before - after).abs().max()) > 1e-3


def test_an_adapter_of_another_shape_is_refused(thinner: Path, adapter: Path) -> None:
    (subject,) = open_subjects([(str(thinner), adapter)])
    with pytest.raises(OptionError, match=r"adapter does not fit .*thinner") as caught:
        load_model(subject, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("blocks", [1, 3])
def test_an_adapter_of_another_depth_is_refused(adapter: Path, tmp_path: Path, blocks: int) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", blocks=blocks)
    (subject,) = open_subjects([(str(other), adapter)])
    with pytest.raises(OptionError, match=r"its tensor \S+ (is missing|has no place there)"):
        load_model(subject, device="cpu", dtype="float32")


def test_adapters_that_are_none(dense: Path, adapter: Path, tmp_path: Path) -> None:
    def opening(path: Path) -> None:
        open_subjects([(str(dense), path)])

    with pytest.raises(MissingPathError, match="is not a directory"):
        opening(tmp_path / "absent")
    with pytest.raises(ForeignArtifactError, match=r"has no adapter_config\.json"):
        opening(dense)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(DamagedArtifactError, match="truncated"):
        opening(adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsafeFileError, match=r"adapter_model\.bin"):
        opening(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ForeignArtifactError, match=r"has no adapter_model\.safetensors"):
        opening(adapter)


def test_adapters_with_virtual_tokens_are_refused(dense: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(dense), config).save_pretrained(tmp_path / "prompt")
    (subject,) = open_subjects([(str(dense), tmp_path / "prompt")])
    with pytest.raises(OptionError, match="virtual tokens"):
        load_model(subject, device="cpu", dtype="float32")


def test_devices_that_are_not_here() -> None:
    assert compute_options("cpu", "float32").device == "cpu"
    for device in ("gpu", "cuda:99"):
        with pytest.raises(OptionError, match=f"--device {device} cannot be used here"):
            compute_options(device, "float32")


def test_a_checkpoint_of_somebody_else_has_no_origin(dense: Path, tmp_path: Path) -> None:
    (subject,) = open_subjects([(str(dense), None)])
    assert dense_reference(subject) is None
    assert default_text(subject) == "builtin:python-docs"
    damaged = write_tiny_checkpoint(tmp_path / "damaged")
    (damaged / "spine.json").write_text("{")
    (subject,) = open_subjects([(str(damaged), None)])
    assert dense_reference(subject) is None
