"""The block stream: a checkpoint run block by block, with one block's weights in memory at a time.

    tokens ─embed─▶ hidden ─block 0─▶ hidden ─block 1─▶ … ─logits─▶ (rows, length, vocabulary)
                                                           ─features─▶ (rows, length, d_model)

The code of every part is transformers' own, from a model on the meta device; the stream only decides which weights
exist when. Embeddings are dropped before the first block is read, and the head is read after the last one is gone.
Between blocks, hidden states are float32 whatever the weights' precision, so that streams can be subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.stopwatch import return_freed_memory
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Family, Task
from spinecli.errors import OptionError, reason_of


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a model calls a block with, behind the hidden states: masks and positions, broadcast over the rows."""

    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)


class Recorder(nn.Module):
    """Stands in a block's place and keeps what the model would have called the block with."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.arguments = Arguments()

    def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        """Keep everything and change nothing."""
        self.hidden, self.arguments = hidden_states, Arguments(positional, named)
        return hidden_states


class Injector(nn.Module):
    """Stands in all blocks' place and hands on what the stream has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)

    def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        """The stream's hidden states, whatever comes in."""
        return self.hidden


def with_linears(blocks: Sequence[nn.Module], family: Family) -> Sequence[nn.Module]:
    """Put a Linear in the place of every transposed projection, so that every family's weights are (d_out, d_in)."""
    for block in blocks if family.transposed else ():
        for name in family.projections:
            d_in, d_out = block.get_parameter(f"{name}.weight").shape
            holder, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(holder), attribute, nn.Linear(d_in, d_out, device="meta").requires_grad_(False))
    return blocks


def answer(output: Any) -> Tensor:
    """The logits in a model's output, or the last hidden states of one without a head, in float32."""
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found.float()


def answering_by_last_token(model: PreTrainedModel) -> PreTrainedModel:
    """Let a causal classifier take the last token of every row, which must then come alone; others do not change.

    It would look for the last token that is no padding, but calibration rows are full, and a token of the text may well
    have the number of the padding.
    """
    if hasattr(model, "score"):
        model.config.pad_token_id = None
    return model


# Tokens that pass through a block together: bounds the memory of a feed-forward layer's activations.
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class ComputeOptions:
    """Where and in which precision the stream computes."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def compute_options(device: str, dtype: str) -> ComputeOptions:
    """Check a device by putting a number on it and reading it back; OptionError if torch cannot compute there."""
    try:
        torch.zeros(1, device=device).item()
    # RuntimeError for unknown names and for meta, AssertionError for a build without CUDA
    except (RuntimeError, AssertionError) as error:
        reason = reason_of(error)
        raise OptionError(f"--device {device} cannot be used here ({reason}); use cpu.") from error
    return ComputeOptions(device, getattr(torch, dtype))


@dataclass(frozen=True)
class LoadedBlock:
    """A block whose weights are in memory."""

    index: int
    module: nn.Module
    arguments: Arguments

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run the block: hidden (rows, length, d_model) float32 -> the same."""
        output: Tensor = self.module(hidden.to(self.dtype), *self.arguments.positional, **self.arguments.named)
        return output.float()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.module.parameters()).dtype

    def has(self, name: str) -> bool:
        """Whether the block has a projection of this name; not if its sub-layer was removed."""
        return any(name == found for found, _ in self.module.named_modules())

    def linear(self, name: str) -> nn.Linear:
        """A projection by its name relative to the block."""
        module = self.module.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name} is a {type(module).__name__}, not a Linear")
        return module


class BlockStream:
    """Runs one checkpoint block by block on rows of one length.

    Args:
        checkpoint: the model.
        length: tokens per row.
        compute: device and dtype.
        context: time spent on reading weights is counted under `reading`.
        opening: special tokens in front of every row, which are given and not predicted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        length: int,
        compute: ComputeOptions | None = None,
        context: RunContext | None = None,
        opening: int = 0,
    ) -> None:
        self.checkpoint = checkpoint
        self.compute = compute or ComputeOptions()
        self._stopwatch = (context or RunContext()).stopwatch
        self.length = length
        self.predicted_from = max(1, opening)
        """The first position of a row whose token is predicted."""
        self._model = answering_by_last_token(checkpoint.skeleton())
        _move_buffers(self._model, self.compute.device)
        holder, _, attribute = checkpoint.blocks_path.rpartition(".")
        self._holder = self._model.get_submodule(holder)
        self._attribute = attribute
        self._blocks = with_linears(list(getattr(self._holder, attribute)), checkpoint.family)
        self._arguments: list[Arguments] = []

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def chunk_rows(self) -> int:
        """Rows that pass through a block together."""
        return max(1, CHUNK_TOKENS // self.length)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states before block 0: tokens (rows, length) -> (rows, length, d_model)."""
        recorders = [Recorder() for _ in self._blocks]
        hidden = []
        with self._outer(self._embedding_names()), self._in_place_of_blocks(recorders):
            # What the model calls each block with: one row's masks and positions broadcast over all rows.
            self._model.base_model(input_ids=tokens[:1].to(self.compute.device), use_cache=False)
            self._arguments = [recorder.arguments for recorder in recorders]
            for chunk in torch.split(tokens, self.chunk_rows):
                self._model.base_model(input_ids=chunk.to(self.compute.device), use_cache=False)
                hidden.append(recorders[0].hidden.float())
        return torch.cat(hidden)

    @contextmanager
    def block(self, index: int) -> Iterator[LoadedBlock]:
        """Block `index` with its weights in memory, for as long as the context lasts. `embed` comes first."""
        module = self._blocks[index]
        values = {relative: self._read(name) for relative, name in self.checkpoint.block_names(index).items()}
        for name in self.checkpoint.family.transposed_names:
            values[name] = values[name].T.contiguous()
        module.load_state_dict(values, assign=True)
        try:
            yield LoadedBlock(index, module, self._arguments[index])
        finally:
            module.to_empty(device="meta")
            return_freed_memory()

    def loaded_blocks(self, indices: Iterable[int] | None = None) -> Iterator[LoadedBlock]:
        """All blocks, or those named, one after the other; each is in memory until the next is asked for."""
        for index in range(self.blocks) if indices is None else indices:
            with self.block(index) as block:
                yield block

    def forward(self, tokens: Tensor) -> Tensor:
        """The hidden states behind the last block: tokens (rows, length) -> (rows, length, d_model)."""
        hidden = self.embed(tokens)
        for block in self.loaded_blocks():
            hidden = self.run(block, hidden)
        return hidden

    @torch.no_grad()
    def run(self, block: LoadedBlock, hidden: Tensor) -> Tensor:
        """Run a block on all rows, a chunk at a time: hidden (rows, length, d_model) -> the same shape."""
        output = torch.empty_like(hidden)
        for rows in self.chunks(hidden):
            output[rows] = block(hidden[rows])
        return output

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Rows that pass through a block together, of hidden (rows, length, d_model)."""
        for start in range(0, len(hidden), self.chunk_rows):
            yield slice(start, start + self.chunk_rows)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """What the model answers, a chunk of rows at a time in float32, from hidden (rows, length, d_model).

        Language models: (chunk, length, vocabulary). Classifiers: (chunk, labels). Bare encoders: the hidden states.
        """
        yield from self._behind_the_blocks(hidden, self._model)

    @torch.no_grad()
    def features(self, hidden: Tensor) -> Iterator[Tensor]:
        """What the head sees, a chunk of rows at a time: hidden (rows, length, d_model) behind the final norm."""
        yield from self._behind_the_blocks(hidden, self._model.base_model)

    def _behind_the_blocks(self, hidden: Tensor, model: PreTrainedModel) -> Iterator[Tensor]:
        alone = model is self._model and self.checkpoint.task is Task.classification
        with self._head(model) as answers:
            for chunk in torch.split(hidden, 1 if alone else self.chunk_rows):
                yield answers(chunk)

    @contextmanager
    def token_logits(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A causal language model's head, in memory for as long as the context lasts: a function from hidden states
        behind the last block, (tokens, d_model), to logits, (tokens, vocabulary) in float32.
        """
        with self._head(self._model) as answers:
            # A row for each token: more tokens than the model has positions are no text that is too long.
            yield lambda hidden: answers(hidden[:, None])[:, 0]

    @contextmanager
    def _head(self, model: PreTrainedModel) -> Iterator[Callable[[Tensor], Tensor]]:
        injector = Injector()
        width = self._model.get_input_embeddings().embedding_dim

        def answers(hidden: Tensor) -> Tensor:
            injector.hidden = hidden.to(self.compute.dtype)
            embeddings = injector.hidden.new_zeros((*hidden.shape[:2], width))
            return answer(model(inputs_embeds=embeddings, use_cache=False))

        with self._outer(self._head_names()), self._in_place_of_blocks([injector]):
            yield answers

    def losses(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """A causal language model's mean negative log-likelihood in nats of each row's predicted tokens.

        Returns: (rows,) float64.
        """
        found = []
        first = self.predicted_from
        for logits, chunk in zip(self.logits(hidden), torch.split(tokens, self.chunk_rows), strict=True):
            targets, predictions = chunk[:, first:].to(logits.device), logits[:, first - 1 : -1]
            losses = nn.functional.cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="none")
            found.append(losses.view(targets.shape).double().mean(dim=1).cpu())
        return torch.cat(found)

    def _read(self, name: str) -> Tensor:
        with self._stopwatch("reading"):
            return self.checkpoint.read(name).to(self.compute.device, self.compute.dtype)

    def _embedding_names(self) -> list[str]:
        head = self._parameter_names(self._model.get_output_embeddings())
        return [name for name in self.checkpoint.outer_names() if name not in head]

    def _head_names(self) -> list[str]:
        predictor = self._model.get_output_embeddings()
        names = self.checkpoint.outer_names()
        if predictor is not None and f"{self._name_of(predictor)}.weight" not in names:
            return names  # tied: the head's weight is stored as the embedding
        embedding = self._parameter_names(self._model.get_input_embeddings())
        return [name for name in names if name not in embedding]

    def _parameter_names(self, module: nn.Module | None) -> set[str]:
        if module is None:
            return set()
        prefix = self._name_of(module)
        return {f"{prefix}.{name}" for name, _ in module.named_parameters()}

    def _name_of(self, module: nn.Module) -> str:
        found: str = next(name for name, candidate in self._model.named_modules() if candidate is module)
        return found

    @contextmanager
    def _outer(self, names: list[str]) -> Iterator[None]:
        """The named tensors outside the blocks, in memory for as long as the context lasts."""
        self._model.load_state_dict({name: self._read(name) for name in names}, strict=False, assign=True)
        self._model.tie_weights()
        try:
            yield
        finally:
            empty = {name: torch.empty(self.checkpoint.tensors[name].shape, device="meta") for name in names}
            self._model.load_state_dict(empty, strict=False, assign=True)
            self._model.tie_weights()

    @contextmanager
    def _in_place_of_blocks(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        blocks = getattr(self._holder, self._attribute)
        setattr(self._holder, self._attribute, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(self._holder, self._attribute, blocks)


def _move_buffers(model: nn.Module, device: str) -> None:
    """Rotary frequencies follow the weights to the device; the parameters stay on the meta device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
