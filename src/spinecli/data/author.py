"""The model as the author of its own calibration text: whether it can write, what it is given, and the work itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import JsonValue
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.manifest import FileRecord, sha256_value
from spinecli.artifacts.stopwatch import return_freed_memory
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.stream.whole_model import stays_on_disk, whole_model
from spinecli.data.chat_form import chat_form_of
from spinecli.data.rows import Frame
from spinecli.data.writing import RULE, RowForm, written_rows
from spinecli.errors import CannotWriteError

PHASE = "writing text"
_BATCH = 64
_CACHE_BYTES = 512 << 20
_GIB = 1 << 30


@dataclass(frozen=True, eq=False)
class Author:
    """A causal language model that is going to write rows."""

    checkpoint: Checkpoint
    digest: str
    """Of the model's files."""
    compute: ComputeOptions
    seed: int
    form: RowForm
    silent: str
    """Why the model writes no conversations although its tokenizer has a chat template; empty if it does."""

    def record(self, rows: int) -> FileRecord:
        """What the text of so many rows will be, by all that decides it."""
        form = self.form
        decided: dict[str, JsonValue] = {
            "rule": RULE,
            "model": self.digest,
            "seed": self.seed,
            "rows": rows,
            "length": form.length,
            "opening": str(form.opening),
            "ends": str(sorted(form.ends)),
            "chat": str(form.chat),
        }
        return FileRecord(sha256=sha256_value(decided), bytes=rows * form.length * torch.int64.itemsize)

    def write(self, rows: int, context: RunContext) -> Tensor:
        """The first rows of the text: (rows, length) int64. What a killed run has written is not written again."""
        length, batch = self.form.length, min(self._batch, rows)
        starts = range(0, rows, batch)
        journal = context.journal(PHASE)
        written = torch.zeros(0, length, dtype=torch.int64)
        if journal and (saved := journal.load()):
            written = saved.tensors["tokens"]
        if len(written) >= rows:
            return written[:rows]
        if stays_on_disk(self.checkpoint):
            context.note(self._cost(len(starts) * (length - 1)))
        with context.stopwatch("computing"):
            model, _ = whole_model(self.checkpoint, self.compute)
            for finished, start in enumerate(starts):
                if start < len(written):
                    continue

                def heard(position: int, before: int = finished * length) -> None:
                    context.progress(PHASE, before + position, len(starts) * length)

                numbers = range(start, min(start + batch, rows))
                written = torch.cat([written, written_rows(model, self.form, numbers, self.seed, heard)])
                if journal:
                    journal.save(finished + 1, {"tokens": written}, last=len(written) == rows)
            del model
            return_freed_memory()
        return written

    @property
    def memory_bytes(self) -> int:
        """What writing holds at once: the weights that are in memory, the cache, and the predictions of a step."""
        checkpoint, width = self.checkpoint, self.compute.dtype.itemsize
        outer = [checkpoint.outer_names()]
        blocks = [list(checkpoint.block_names(index).values()) for index in range(checkpoint.blocks)]
        sizes = [sum(torch.Size(checkpoint.tensors[each].shape).numel() for each in names) for names in outer + blocks]
        weights = sizes[0] + (max(sizes[1:]) if stays_on_disk(checkpoint) else sum(sizes[1:]))
        predictions = self._batch * int(checkpoint.config.vocab_size) * torch.float32.itemsize
        return weights * width + self._batch * self._cache_bytes + 3 * predictions

    @property
    def _batch(self) -> int:
        """Rows that are written at once."""
        return max(1, min(_BATCH, _CACHE_BYTES // max(1, self._cache_bytes)))

    @property
    def _cache_bytes(self) -> int:
        """Of the keys and values of one row."""
        width = sum(shape.kv_heads * shape.head_dim for shape in self.checkpoint.shapes)
        return 2 * width * self.form.length * self.compute.dtype.itemsize

    def _cost(self, steps: int) -> str:
        checkpoint = self.checkpoint
        names = (name for index in range(checkpoint.blocks) for name in checkpoint.block_names(index).values())
        size = sum(checkpoint.tensors[name].bytes for name in names) / _GIB
        return (
            f"The model writes its calibration text with its blocks on disk: {size:.1f} GiB are read in each of "
            f"{steps} steps, {size * steps:,.0f} GiB in all; a text of your own does without."
        )


def open_author(
    checkpoint: Checkpoint,
    reference: str,
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    length: int,
    *,
    digest: str,
    seed: int,
    compute: ComputeOptions,
) -> Author:
    """A model that is asked to write rows of `length` tokens.

    Args:
        reference: the model as the user named it.
        digest: of the model's files.

    Raises: CannotWriteError unless it is a causal language model.
    """
    if checkpoint.task is not Task.causal_lm:
        raise CannotWriteError(
            f"{reference} is made for {checkpoint.task.value} and writes no text, so it cannot calibrate on its own; "
            "name a text with --calibration."
        )
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    size = min(len(tokenizer), int(checkpoint.config.vocab_size))
    form = RowForm(
        length=length,
        opening=frame.opening,
        words=tuple(token for token in range(size) if token not in special),
        ends=_ends(checkpoint, tokenizer),
    )
    chat = chat_form_of(tokenizer, frame.opening_text) if tokenizer.chat_template else ""
    if not isinstance(chat, str) and 2 * (chat.size + frame.size) > length:
        chat = f"the chat template takes {chat.size} of {length} tokens, more than half a row"
    silent = chat if isinstance(chat, str) else ""
    form = form if isinstance(chat, str) else replace(form, chat=chat)
    return Author(checkpoint, digest, compute, seed, form, silent)


def _ends(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens by which the model ends what it writes, as far as its files say."""
    try:
        generation = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True).eos_token_id
    except (OSError, ValueError):  # it has no such file, as many have not
        generation = None
    found: set[int] = set()
    for ends in (generation, checkpoint.config.eos_token_id, tokenizer.eos_token_id):
        found |= {ends} if isinstance(ends, int) else set(ends or ())
    return frozenset(found)
