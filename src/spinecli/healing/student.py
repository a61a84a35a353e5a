"""The student as it is trained: transformers' own model, PEFT's factors in it, and what they make of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from spinecli.artifacts.seeding import torch_generator
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.stream.whole_model import whole_model
from spinecli.checkpoints.tensors import ComputedTensor, TensorSource
from spinecli.errors import VerificationError
from spinecli.healing.config import DistillConfig, Train

_ADAPTER = "default"
_TOLERANCE = 2e-2
_PROBE = 16


class Student:
    """A checkpoint in memory, some of whose parameters are trained in float32.

    Raises: VerificationError if the model computes its logits in a way that is not known here.
    """

    def __init__(self, checkpoint: Checkpoint, training: DistillConfig, compute: ComputeOptions, seed: int) -> None:
        self.checkpoint = checkpoint
        self._compute = compute
        kept = torch.float32 if training.train is Train.full else compute.dtype
        self.model, _ = whole_model(checkpoint, ComputeOptions(compute.device, kept), in_memory=True)
        self.model.requires_grad_(False)
        self._head = self.model.get_output_embeddings()
        self._cap: float | None = getattr(self.model.config, "final_logit_softcapping", None)
        self._require_known_head()
        if training.train is Train.lora:
            self._add_factors(training, seed)
        self.trained = dict(self._chosen(training))
        """By name in the model."""
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._keep_no_wide_copies()
        if training.recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True  # the layer's own flag alone: what is in it draws no dropout

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.model.config.vocab_size)

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """The head: (positions, d_model) behind the final norm -> logits (positions, vocabulary)."""
        with self._precision():
            logits: Tensor = self._head(hidden)
            return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Tokens (rows, length) -> (rows, length, d_model) behind the final norm."""
        with self._precision():
            tokens = tokens.to(self.model.device)
            answer = self.model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
            found: Tensor = answer.last_hidden_state
            return found

    def healed(self) -> Checkpoint:
        """The checkpoint with what training has made of it, in the precision in which it is stored."""
        tensors: dict[str, TensorSource] = dict(self.checkpoint.tensors)
        for name, value in self._changes().items():
            stored = self.checkpoint.tensors[name]
            tensors[name] = ComputedTensor(stored.shape, stored.dtype, partial(_stored, value, stored))
        return replace(self.checkpoint, tensors=tensors)

    def settle(self) -> None:
        """End training: the model gets the weights that `healed` gives, rounded as they will be read."""
        healed = self.healed()
        for name, change in self._changes().items():
            parameter = self._parameter(name)
            parameter.data = healed.read(name).to(parameter.device, parameter.dtype)
            if isinstance(change, LoraLayer):
                change.enable_adapters(False)

    def _precision(self) -> torch.autocast:
        dtype = self._compute.dtype
        return torch.autocast(self.model.device.type, dtype, enabled=dtype is not torch.float32)

    def _chosen(self, training: DistillConfig) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained; norms below the factors are not, so that no gradient has to pass there."""
        blocks, ranks = self.checkpoint.family.blocks, training.ranks(self.checkpoint.blocks)
        below = tuple(f"{blocks}.{index}." for index, rank in enumerate(ranks) if not rank)
        for name, parameter in self.model.named_parameters():
            of_norm = "Norm" in type(self.model.get_submodule(name.rpartition(".")[0])).__name__
            if training.train is Train.full or (of_norm and not name.startswith(below)) or "lora_" in name:
                yield name, parameter

    def _add_factors(self, training: DistillConfig, seed: int) -> None:
        """PEFT's factors beside the projections of the blocks, drawn from the seed."""
        checkpoint, family, rank = self.checkpoint, self.checkpoint.family, training.rank
        targets = [
            f"{family.blocks}.{index}.{projection}"
            for index, rank_here in enumerate(training.ranks(checkpoint.blocks))
            for projection in family.projections
            if rank_here and checkpoint.has(index, projection)
        ]
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0, fan_in_fan_out=family.transposed
        )
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, self.model, _ADAPTER)
        for name, parameter in self.model.named_parameters():
            if "lora_A" in name:
                drawn = torch.rand(parameter.shape, generator=torch_generator(seed, "factors", name))
                parameter.data = ((drawn * 2 - 1) / parameter.shape[1] ** 0.5).to(parameter.device)

    def _keep_no_wide_copies(self) -> None:
        """Hand activations on in the computation's precision: trained parameters are float32, and what they are given
        or give would otherwise be copied to it, once for every projection, and kept for the backward pass.
        """
        blocks = self.model.get_submodule(self.checkpoint.family.blocks)
        for module in blocks.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False
            elif "Norm" in type(module).__name__:
                module.register_forward_hook(self._narrow)

    def _narrow(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.to(self._compute.dtype)

    def _changes(self) -> dict[str, nn.Parameter | LoraLayer]:
        """What the trained parameters change, by name in the checkpoint."""
        found: dict[str, nn.Parameter | LoraLayer] = {
            name: parameter
            for name, parameter in self.trained.items()
            if "lora_" not in name and name in self.checkpoint.tensors
        }
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                found[f"{name}.weight"] = module
        return found

    def _parameter(self, name: str) -> nn.Parameter:
        """The model's parameter that a tensor of the checkpoint became."""
        module, _, kind = name.rpartition(".")
        holder = self.model.get_submodule(module)
        if isinstance(holder, LoraLayer):
            holder = holder.get_base_layer()
        parameter: nn.Parameter = holder.get_parameter(kind)
        return parameter

    @torch.no_grad()
    def _require_known_head(self) -> None:
        tokens = (torch.arange(_PROBE)[None] % self.vocabulary).to(self.model.device)
        with self._precision():
            answer = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        expected = answer.logits[0].float()
        found = self(self.hidden(tokens)[0]).float()
        if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())):
            raise VerificationError(
                f"The logits of {self.checkpoint.family.model_type} are computed in a way that spine heal does not "
                "know; nothing was written, please report it."
            )


def _stored(change: nn.Parameter | LoraLayer, stored: TensorSource) -> Tensor:
    """A trained tensor in its stored precision; of a projection its own weight and the product of its factors."""
    with torch.no_grad():
        if isinstance(change, LoraLayer):
            product: Tensor = change.get_delta_weight(_ADAPTER).float().cpu()
            return (stored.read().float() + product).to(stored.dtype)
        return change.detach().cpu().to(stored.dtype)
