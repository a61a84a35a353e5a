"""PEFT adapters: checked on disk, then put on a model as PEFT puts them. Pickled ones are never opened."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from spinecli.artifacts.manifest import MANIFEST_NAME
from spinecli.checkpoints.checkpoint import Checkpoint, fine_tuned
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.skeleton import build_skeleton
from spinecli.checkpoints.tokenizer import has_tokenizer, padding_id, tokenizer_of
from spinecli.errors import (
    DamagedArtifactError,
    ForeignArtifactError,
    MissingPathError,
    OptionError,
    UnsafeFileError,
    reason_of,
)
from spinecli.lora.peft_format import CONFIG_NAME, PEFT_PREFIX, WEIGHTS_NAME

# How factors may begin without a change of the weights that they stand beside.
_LEAVING_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Those that take out of the weights what they put into the factors, the same at every loading.
_PISSA, _OLORA = "pissa", "olora"
# Fields of LoraConfig under which a merged weight computes what the adapter does. PEFT's others are refused when they
# are set: they act on activations, on parameters that are no module's, or rewrite the weights in ways of their own.
_MERGEABLE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "trainable_token_indices", "eva_config", "use_dora", "velora_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's `adapter_config.json`, of which every setting is one that the installed PEFT knows."""

    directory: Path
    settings: Mapping[str, Any]

    @property
    def classifies(self) -> bool:
        """Whether the adapter makes a classifier of its model."""
        return self.settings.get("task_type") == "SEQ_CLS"

    @property
    def base(self) -> str | None:
        """The checkpoint that it was trained on, as its author named it."""
        return self.settings.get("base_model_name_or_path") or None

    @property
    def _initialisation(self) -> Any:
        name = self.settings.get("init_lora_weights", True)
        return name.lower() if isinstance(name, str) else name

    def require_loadable(self) -> None:
        """Refuse adapters that PEFT's loader puts on a model otherwise than they were trained.

        Raises: OptionError.
        """
        begun = self._initialisation
        if self.settings.get("peft_type") != "LORA" or begun in (*_LEAVING_INITIALISATIONS, _PISSA, _OLORA):
            return
        raise OptionError(
            f"The adapter {self.directory} was initialised with init_lora_weights {begun!r}, which changes the base "
            "weights in a way that loading does not repeat; save it as a plain one first, with save_pretrained's "
            "path_initial_model_for_weight_conversion."
        )

    def require_mergeable(self) -> None:
        """Refuse adapters that no merged weight can stand for.

        Raises: OptionError.
        """
        if self.settings.get("peft_type") != "LORA":
            raise OptionError(
                f"The adapter {self.directory} is {self.settings.get('peft_type')!r}; spine export merges LoRA only."
            )
        self.require_loadable()
        for field in dataclasses.fields(LoraConfig):
            if field.name not in _MERGEABLE and self.settings.get(field.name):
                raise OptionError(
                    f"The adapter {self.directory} was trained with {field.name}, which spine export does not merge; "
                    "merge it with PEFT, if that can, before the export."
                )

    def rewrite_base(self, layer: LoraLayer, adapter: str) -> None:
        """Take out of a layer's weight what its factors began with, as PEFT's loader does; the factors are undefined
        afterwards.
        """
        if self._initialisation == _PISSA:
            layer.pissa_init(adapter, _PISSA)
        elif self._initialisation == _OLORA:
            layer.olora_init(adapter)


def adapter_config(directory: Path) -> AdapterConfig:
    """The configuration of the adapter in `directory`.

    Raises: MissingPathError, ForeignArtifactError, DamagedArtifactError; OptionError if a newer PEFT wrote it.
    """
    if not directory.is_dir():
        raise MissingPathError(f"{directory} is not a directory; name one that holds a PEFT adapter.")
    file = directory / CONFIG_NAME
    if not file.is_file():
        raise ForeignArtifactError(f"{directory} has no {CONFIG_NAME}; name a directory that holds a PEFT adapter.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedArtifactError(f"{file} is not readable JSON; fetch the adapter again.") from error
    if not isinstance(settings, dict):
        raise DamagedArtifactError(f"{file} is not a JSON object; fetch the adapter again.")
    if settings.get("peft_type") == "LORA":
        # PEFT would leave them out with a warning, and so load something else than was trained
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        if unknown := sorted(name for name, value in settings.items() if name not in known and value):
            raise OptionError(f"{file} sets {unknown[0]}, which the installed PEFT does not know; update peft.")
    return AdapterConfig(directory, settings)


def adapter_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of an adapter, from its header alone.

    Raises: MissingPathError, ForeignArtifactError, UnsafeFileError (pickled weights), DamagedArtifactError.
    """
    adapter_config(directory)
    weights = directory / WEIGHTS_NAME
    if not weights.is_file():
        pickles = sorted(path.name for path in directory.glob("adapter_model.*"))
        if pickles:
            raise UnsafeFileError(
                f"{directory} holds {pickles[0]} and no {WEIGHTS_NAME}; spine never unpickles, so save the adapter "
                "as safetensors first."
            )
        raise ForeignArtifactError(f"{directory} has no {WEIGHTS_NAME}; name a directory that holds a PEFT adapter.")
    try:
        with safe_open(weights, framework="pt") as handle:
            names = list(handle.keys())
            return {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise DamagedArtifactError(f"{weights} is truncated or not safetensors; fetch the adapter again.") from error


def classifying_head(directory: Path, skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """What an adapter that `adapter_shapes` has checked brings of a classifier's own tensors.

    Args:
        skeleton: the classifier without weights, by whose names they come back.
    """
    names = set(skeleton.state_dict())
    with safe_open(directory / WEIGHTS_NAME, framework="pt") as handle:
        plain = {
            re.sub(r"\.modules_to_save(\.default)?\.", ".", name.removeprefix(PEFT_PREFIX)).replace(
                ".default.", "."
            ): name
            for name in handle.keys()  # noqa: SIM118
        }
        return {name: handle.get_tensor(stored) for name, stored in plain.items() if name in names}


def labels_of(head: str, skeleton: nn.Module, values: Mapping[str, Tensor]) -> int | None:
    """How many labels a classifying head tells apart; None if its last layer is not among `values`.

    Args:
        head: name of the classifying module in the skeleton.
    """
    linears = [
        f"{head}.{name}.weight" if name else f"{head}.weight"
        for name, module in skeleton.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear)
    ]
    return len(values[linears[-1]]) if linears[-1] in values else None


def finite_values(directory: Path, value: Tensor) -> Tensor:
    """A tensor of the adapter in `directory`, if all its numbers are finite; else DamagedArtifactError."""
    if not bool(torch.isfinite(value).all()):
        raise DamagedArtifactError(f"{directory} holds NaN or infinite values; train the adapter again.")
    return value


def embedding_rows(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rows of the embedding that an adapter of these shapes brings, if the model's has another number of them."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    own = {stored: shape for stored, shape in shapes.items() if stored.startswith(f"{PEFT_PREFIX}{name}.")}
    rows = {shape[0] for stored, shape in own.items() if stored.endswith(".weight") and ".lora_" not in stored}
    return max(rows) if rows and rows != {embedding.num_embeddings} else None


def _grow(model: PreTrainedModel, rows: int, shapes: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    """Give the model's embedding and head so many rows, which the adapter is about to fill.

    Raises: OptionError if it brings no head for a model whose head is not its embedding.
    """
    head = model.get_output_embeddings()
    if head is not None:
        name = next(name for name, module in model.named_modules() if module is head)
        own = [stored for stored in shapes if stored.startswith(f"{PEFT_PREFIX}{name}.") and ".lora_" not in stored]
        if not own and f"{name}.weight" not in model.all_tied_weights_keys:
            raise OptionError(
                f"The adapter {directory} extended the vocabulary to {rows} tokens and has no {name}.weight; save it "
                "with its embedding layers."
            )
    resized = model.resize_token_embeddings(rows, mean_resizing=False)
    if model.device.type == "meta":
        # PEFT copies rows of it where some are trained alone
        resized.to_empty(device="cpu")
        model.tie_weights()


def attach_adapter(model: PreTrainedModel, directory: Path, base: str) -> PeftModel:
    """The model, called `base` by the user, with the adapter on it, unmerged, in evaluation mode.

    The model may be without weights; then only what the adapter brings as a whole has values.

    Raises: OptionError if the adapter was made for another model, and everything `adapter_shapes` raises.
    """
    settings, stored = adapter_config(directory), adapter_shapes(directory)
    settings.require_loadable()
    misfit = f"The adapter {directory} does not fit {base}"
    way_out = f"name the checkpoint that it was trained on, {settings.base}" if settings.base else (
        "name the checkpoint that it was trained on"
    )  # fmt: skip
    weightless = any(parameter.device.type == "meta" for parameter in model.parameters())
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if config.is_prompt_learning:
            raise OptionError(f"The adapter {directory} adds virtual tokens; spine measures adapters of weights only.")
        if (rows := embedding_rows(model, stored)) is not None:
            _grow(model, rows, stored, directory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is said below
            adapted = PeftModel.from_pretrained(
                model,
                str(directory),
                config=config,
                is_trainable=False,
                torch_device="cpu" if weightless else str(model.device),
                low_cpu_mem_usage=weightless,
            )
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = reason_of(error, -1)
        raise OptionError(f"{misfit} ({reason}); {way_out}.") from error
    # embeddings that grew are saved as they stand in the model, beside what the adapter has of them
    whole = {name.replace(".default", "") for name in adapted.state_dict()}
    for name in sorted(wanted.keys() - stored.keys()):
        raise OptionError(f"{misfit}: its tensor {name} is missing; {way_out}.")
    for name in sorted(stored.keys() - wanted.keys() - whole):
        raise OptionError(f"{misfit}: its tensor {name} has no place there; {way_out}.")
    for value in wanted.values():
        if value.device.type != "meta":
            finite_values(directory, value)
    return adapted.eval()


def adapted_classifier(checkpoint: Checkpoint, adapter: Path, reference: str) -> Checkpoint:
    """The checkpoint, called `reference` by the user, as a classifier with the head that an adapter brings.

    Where the checkpoint has no classifier with as many labels, or fed-launch wrote the adapter, nothing says what the
    labels are called, and the padding is the tokenizer's, as fed-launch trains; without a tokenizer it stays unnamed.

    Raises: OptionError if neither checkpoint nor adapter has the whole head; TokenizerError, DamagedArtifactError.
    """
    skeleton = build_skeleton(checkpoint.config, Task.classification)
    head = classifying_head(adapter, skeleton)
    misfit = f"The adapter {adapter} does not fit {reference}"
    labels = labels_of(checkpoint.family.classification_head, skeleton, head) or checkpoint.labels
    if labels is None:
        raise OptionError(f"{misfit}: neither of them has a classifier; name the checkpoint that it was trained on.")
    own = checkpoint.labels == labels and not (adapter / MANIFEST_NAME).is_file()
    try:
        return fine_tuned(checkpoint, Task.classification, head, {} if own else _unnamed(checkpoint, labels))
    except ValueError as error:
        raise OptionError(f"{misfit} ({error}); name the checkpoint that it was trained on.") from error


def _unnamed(checkpoint: Checkpoint, labels: int) -> dict[str, Any]:
    """The keys of config.json of a classifier whose labels have no names."""
    names = {str(index): f"LABEL_{index}" for index in range(labels)}
    settings: dict[str, Any] = {
        "id2label": names,
        "label2id": {name: int(index) for index, name in names.items()},
        "num_labels": labels,
        "problem_type": None,
    }
    if has_tokenizer(checkpoint.path):
        settings["pad_token_id"] = padding_id(tokenizer_of(checkpoint))
    return settings
