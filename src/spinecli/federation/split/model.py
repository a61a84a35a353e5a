"""A task model cut at a block: the bottom for devices, the top for the server, and both joined again.

    tokens ─embeddings, blocks 0 … cut-1─▶ features (rows, length, d_model) ─blocks cut … , head─▶ answers
           └──────── bottom ────────┘                                      └───────── top ────────┘

The code of both halves is transformers' own: stand-ins take the place of the blocks that the other half has. Weights
that are trained are never in the model itself but come in with every call, so that one model in memory serves every
device of a simulated fleet, and the graphs of several devices may wait for their gradients at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions, Injector, Recorder
from spinecli.data.batches import IGNORED, Batch
from spinecli.data.config import Task
from spinecli.errors import OptionError
from spinecli.federation.client.adapted_linear import AdaptedLinear
from spinecli.federation.client.base_model import load_task_model
from spinecli.federation.client.wire import shared_a
from spinecli.federation.config import LoraConfig, Optimizer, SplitConfig
from spinecli.lora.factors import empty_b, target_projections

Parameters = Mapping[str, Tensor]
"""Trained tensors by their names in the model; of an adapted projection `<name>.a` and `<name>.b`."""


def require_precision(split: SplitConfig, dtype: torch.dtype) -> None:
    """Raise OptionError if weights themselves are to be trained in less than float32."""
    full = [side for side, mode in (("--bottom", split.bottom), ("--top", split.top)) if mode == "full"]
    if full and dtype is not torch.float32:
        raise OptionError(
            f"{full[0]} full trains the weights themselves, which needs --dtype float32; or take {full[0]} lora."
        )


class SplitModel:
    """A checkpoint with a head for the task, cut before block `cut`.

    Args:
        checkpoint: where the weights start.
        task: `classification` puts a head of `labels` outputs on it, `language` keeps the language model's own.
        cut: blocks in the bottom, at least 1; with all of them nothing is split, and only `joined_answers` is of use.
        split: what is trained of each half. The head is always trained, as part of the top.
        lora: the factors of a half that trains LoRA.
        pad_id: token that fills up short rows.
        seed: of LoRA's A, and of a head that the checkpoint does not bring.

    Raises: OptionError, NonFiniteWeightsError, DamagedCheckpointError.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: Task,
        labels: int,
        cut: int,
        split: SplitConfig,
        lora: LoraConfig,
        pad_id: int,
        seed: int,
        compute: ComputeOptions,
    ) -> None:
        require_precision(split, compute.dtype)
        self.checkpoint = checkpoint
        self.task: Task = task
        self.cut = cut
        self.split = split
        self.lora = lora
        self.pad_id = pad_id
        self.compute = compute
        self.model, self.head_modules = load_task_model(checkpoint, task, labels, pad_id, seed, compute)
        holder_name, _, self._attribute = checkpoint.family.blocks.rpartition(".")
        self._holder = self.model.get_submodule(holder_name)
        self._blocks: list[nn.Module] = list(getattr(self._holder, self._attribute))
        self._base_prefix = f"{self.model.base_model_prefix}."
        self._adapted = self._adapt(target_projections(checkpoint.family, lora.targets), seed)
        self.bottom_names, self.top_names = self._trained_names()
        parameters = dict(self.model.named_parameters())
        self.bottom_start = {name: parameters[name].detach().clone() for name in self.bottom_names}
        """Trained tensors of the bottom as the checkpoint has them."""
        self.top_start = {name: parameters[name].detach().clone() for name in self.top_names}

    @property
    def d_model(self) -> int:
        """Width of a feature."""
        return self.checkpoint.d_model

    def features(self, bottom: Parameters, batch: Batch) -> Tensor:
        """What the bottom makes of a batch: (rows, length, d_model), with its graph."""
        recorder = Recorder()
        inputs = {name: value.to(self.compute.device) for name, value in batch.model_inputs().items()}
        with self._in_place_of_blocks([*self._blocks[: self.cut], recorder]):
            own = {name.removeprefix(self._base_prefix): value for name, value in bottom.items()}
            functional_call(self.model.base_model, own, kwargs={**inputs, "use_cache": False})
        return recorder.hidden

    def answers(
        self, top: Parameters, features: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits and targets from features, one row an answer: (answers, choices) float32 and (answers,) int64.

        No token is needed: where the model asks for tokens, to find padding or the end of a row, it gets placeholders.

        Args:
            features: (rows, length, d_model).
            attention_mask: (rows, length) int64.
            labels: classes (rows,), or tokens (rows, length) with IGNORED where nothing is learned.
        """
        injector = Injector()
        injector.hidden = features
        passing = [injector, *(Recorder() for _ in range(self.cut - 1))]
        mask = attention_mask.to(self.compute.device)
        placeholders = torch.where(mask.bool(), int(self.pad_id == 0), self.pad_id)
        with self._in_place_of_blocks([*passing, *self._blocks[self.cut :]]):
            return self._answered(top, {"input_ids": placeholders, "attention_mask": mask}, labels)

    def joined_answers(self, trained: Parameters, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same from a batch by the whole model; `trained` holds the tensors of both halves."""
        inputs = {name: value.to(self.compute.device) for name, value in batch.model_inputs().items()}
        return self._answered(trained, inputs, batch.labels)

    def _answered(self, trained: Parameters, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        labels = labels.to(self.compute.device)
        if self.task == "classification":
            return functional_call(self.model, dict(trained), kwargs=inputs).logits.float(), labels
        output = functional_call(self.model, dict(trained), kwargs={**inputs, "use_cache": False})
        targets = labels[:, 1:]
        counted = targets != IGNORED
        return output.logits[:, :-1][counted].float(), targets[counted]

    def merged(self, trained: Parameters) -> dict[str, Tensor]:
        """The weights that differ from the checkpoint's, by name, with LoRA added to what it stands beside."""
        values = {}
        for name, value in trained.items():
            projection, _, factor = name.rpartition(".")
            if projection not in self._adapted:
                values[name] = value
            elif factor == "b":
                change = self.lora.scale * value @ trained[f"{projection}.a"]
                values[f"{projection}.weight"] = self._adapted[projection].weight.float() + change
        return values

    def _adapt(self, targets: Sequence[str], seed: int) -> dict[str, AdaptedLinear]:
        """Put fresh factors beside the projections of every half that trains LoRA, by the projections' full names."""
        adapted = {}
        for index in range(len(self._blocks)):
            if (self.split.bottom if index < self.cut else self.split.top) != "lora":
                continue
            for relative in (name for name in targets if self.checkpoint.has(index, name)):
                name = f"{self.checkpoint.family.blocks}.{index}.{relative}"
                linear = self.model.get_submodule(name)
                if not isinstance(linear, nn.Linear):
                    raise TypeError(f"{name} is a {type(linear).__name__}, not a Linear")
                projection = AdaptedLinear(linear)
                a = shared_a(seed, name, self.lora.rank, linear.in_features)
                projection.attach(a, empty_b(linear.out_features, self.lora.rank), self.lora.scale)
                parent, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(parent), attribute, projection)
                adapted[name] = projection
        return adapted

    def _trained_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the trained tensors of bottom and top, in the model's order.

        A tensor that both halves use, a tied embedding, is trained in neither.
        """
        every = dict(self.model.named_parameters())
        blocks = {
            name: int(name.removeprefix(f"{self.checkpoint.family.blocks}.").partition(".")[0])
            for name in every
            if name.startswith(f"{self.checkpoint.family.blocks}.")
        }
        before = self._parameters_before_blocks()
        tied = self._tied_to_the_head()
        in_head = {name for name in every if name.startswith(tuple(f"{module}." for module in self.head_modules))}
        factors = {f"{name}.{side}" for name in self._adapted for side in ("a", "b")}
        bottom: list[str] = []
        top: list[str] = []
        for name in every:
            if name in tied:
                continue
            lower = blocks[name] < self.cut if name in blocks else name in before
            way = self.split.bottom if lower else self.split.top
            if way == "full" or name in in_head or name in factors:
                (bottom if lower else top).append(name)
        return tuple(bottom), tuple(top)

    def _parameters_before_blocks(self) -> set[str]:
        """Names of the parameters of the modules that run before the first block: found by running them."""
        seen: list[str] = []
        reached = False

        def note(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any) -> None:
                if not reached:
                    seen.append(name)

            return hook

        class _Gate(Recorder):
            def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
                nonlocal reached
                reached = True
                return hidden_states

        handles = [module.register_forward_pre_hook(note(name)) for name, module in self.model.named_modules()]
        try:
            with torch.no_grad(), self._in_place_of_blocks([_Gate()]):
                tokens = torch.tensor([[0, 1]], device=self.compute.device)
                self.model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        finally:
            for handle in handles:
                handle.remove()
        return {
            f"{name}.{own}" if name else own
            for name in seen
            for own, _ in self.model.get_submodule(name).named_parameters(recurse=False)
        }

    def _tied_to_the_head(self) -> set[str]:
        """Names of the embedding that is also the language model's head."""
        predictor, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if predictor is None or predictor.weight is not embedding.weight:
            return set()
        return {name for name, value in self.model.named_parameters() if value is embedding.weight}

    @contextmanager
    def _in_place_of_blocks(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        blocks = getattr(self._holder, self._attribute)
        setattr(self._holder, self._attribute, nn.ModuleList(modules))
        try:
            yield
        finally:
            setattr(self._holder, self._attribute, blocks)


def optimizer_of(kind: Optimizer, parameters: Sequence[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, or plain SGD without momentum (the authors' release of MergeSFL)."""
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
