"""What a run calibrates on: opened when everything is checked, read or written when the run needs it.

Opening reads the named texts, so that mistakes are found early, and deals the rows. What the model is to write itself
takes minutes and is left to the run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.manifest import FileRecord, Source, sha256_value
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.tokenizer import tokenizer_of
from spinecli.data.author import Author, open_author
from spinecli.data.config import CalibrationConfig
from spinecli.data.packing import packed_rows
from spinecli.data.rows import Frame, TokenRows, frame_of, record_of, token_rows
from spinecli.data.sources import SELF, deal, kind_names, read_sources, shared_out
from spinecli.data.text import Text, load_text
from spinecli.errors import CalibrationTextError, OptionError

_log = logging.getLogger(__name__)
_STAND_IN = "builtin:python-docs"
_OWN_TEXT = "text that the model writes itself"


@dataclass(frozen=True, eq=False)
class Calibration:
    """The rows of a run, of which those that the model writes are not there yet."""

    reference: str
    """The texts as the user named them."""
    kinds: tuple[str, ...]
    """What a person calls each text, see `TokenRows.kinds`."""
    descriptions: tuple[str, ...]
    """Of each text, for a person."""
    kind_of: Tensor
    """(rows,) int64: the number of each row's kind."""
    known: Tensor
    """(rows, length) int64; zeros where the model is to write."""
    frame: Frame
    author: Author | None = None
    """Who writes the rows of the kind `self`; None if there are none."""
    written: TokenRows | None = None
    """All rows, once they are there."""
    scored: Tensor | None = None
    """(rows, length) bool, see `TokenRows.scored`."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.known)

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.known.shape[1]

    @property
    def description(self) -> str:
        """For a person: the texts, with their rows if there are several."""
        if len(self.kinds) == 1:
            return self.descriptions[0]
        counts = Counter(self.kind_of.tolist())
        return "; ".join(f"{counts[number]} rows of {text}" for number, text in enumerate(self.descriptions))

    @property
    def memory_bytes(self) -> int:
        """What making the rows holds in memory beside them."""
        return self.author.memory_bytes if self.author else 0

    def source(self) -> Source:
        """The rows as an input of a step: token ids of named texts, and what decides the text of the model."""
        named, files = self.known[~self._own], {}
        if len(named):
            files["token ids"] = record_of(named)
        if self.scored is not None:
            files["scored"] = record_of(self.scored)
        if len(self.kinds) > 1:
            dealt = sha256_value([list(self.kinds), self.kind_of.tolist()])
            files["kinds"] = FileRecord(sha256=dealt, bytes=self.rows * torch.int64.itemsize)
        if self.author:
            files[SELF] = self.author.record(int(self._own.sum()))
        return Source(reference=self.reference, files=files)

    def read(self, context: RunContext | None = None) -> TokenRows:
        """All rows; the model writes its own now, unless the context's state has them already."""
        if self.written:
            return self.written
        own = self.author.write(int(self._own.sum()), context or RunContext()) if self.author else None
        return self._with(own)

    def settled(self, rows: TokenRows) -> Calibration:
        """The same with what `read` gave, which is not written again."""
        return replace(self, written=rows)

    def stand_in(self) -> TokenRows:
        """All rows without any writing: in place of what the model would write stands text that is always there."""
        if self.written or self.author is None:
            return self.read()
        wanted, checkpoint = int(self._own.sum()), self.author.checkpoint
        found = token_rows(
            tokenizer_of(checkpoint),
            load_text(_STAND_IN),
            wanted,
            self.length,
            frame=self.frame,
            vocabulary=int(checkpoint.config.vocab_size),
        ).tokens
        return self._with(found.repeat(-(-wanted // len(found)), 1)[:wanted])

    def _with(self, own: Tensor | None) -> TokenRows:
        tokens = self.known.clone()
        if own is not None:
            tokens[self._own] = own
        return TokenRows(tokens, self.kinds, self.kind_of, self.frame, self.scored)

    @property
    def _own(self) -> Tensor:
        """(rows,) bool: what the model writes."""
        if self.author is None:
            return torch.zeros(self.rows, dtype=torch.bool)
        return self.kind_of == self.kinds.index(SELF)


def default_words(checkpoint: Checkpoint, reference: str) -> tuple[str, ...]:
    """What a model calibrates on if no text is named.

    Args:
        reference: the model as the user named it.
    """
    if reference.startswith("builtin:"):
        return ("builtin:tiny-calibration",)
    return (SELF,) if checkpoint.task is Task.causal_lm else ("builtin:python-docs",)


_TOKENS_PER_CHANNEL = 24
_ROWS = (128, 512)
_ROWS_AT_A_TIME = 32


def default_rows(checkpoint: Checkpoint, length: int) -> int:
    """How many rows of `length` tokens a re-fit of the widest block wants: one unknown more wants tokens more."""
    tokens = _TOKENS_PER_CHANNEL * max(shape.channels for shape in checkpoint.shapes)
    rows = -(-tokens // (length * _ROWS_AT_A_TIME)) * _ROWS_AT_A_TIME
    return min(max(rows, _ROWS[0]), _ROWS[1])


def kept_calibration(rows: TokenRows, reference: str) -> Calibration:
    """Rows that an earlier run has calibrated on, under the name that they had there."""
    return Calibration(reference, rows.kinds, rows.kinds, rows.kind_of, rows.tokens, rows.frame)


def open_calibration(
    checkpoint: Checkpoint,
    model: Source,
    options: CalibrationConfig,
    *,
    seed: int = 0,
    compute: ComputeOptions | None = None,
    option: str = "--calibration",
    packed: bool = False,
) -> Calibration:
    """Read the texts that a run is to calibrate on, and deal its rows.

    Args:
        model: the checkpoint as the user named it, with its sums.
        seed: for what the model writes.
        option: the one that names the texts, as an error names it.
        packed: rows are to be trained on, see `packed_rows`.

    Raises: CalibrationTextError, CannotWriteError, MissingPathError, OfflineError, TokenizerError, OptionError.
    """
    length = options.length
    _check_length(checkpoint, length, option)
    sources = read_sources(options.text or default_words(checkpoint, model.reference), option)
    tokenizer = tokenizer_of(checkpoint)
    frame, vocabulary = frame_of(checkpoint, tokenizer, options.special_tokens), int(checkpoint.config.vocab_size)
    author = None
    if any(source.reference == SELF for source in sources):
        author = open_author(
            checkpoint,
            model.reference,
            tokenizer,
            frame,
            length,
            digest=model.digest,
            seed=seed,
            compute=compute or ComputeOptions(),
        )
        if author.silent:
            _log.warning(f"The model writes plain text and no conversations, because {author.silent}.")
    texts = {number: load_text(each.reference) for number, each in enumerate(sources) if each.reference != SELF}

    def rows_of(number: int, wanted: int) -> TokenRows:
        read = packed_rows if packed else token_rows
        return read(tokenizer, texts[number], wanted, length, frame=frame, vocabulary=vocabulary)

    weights, names = [source.weight for source in sources], kind_names(sources)
    rows = options.rows or default_rows(checkpoint, length)
    parts, shares = _gathered(weights, texts, rows, rows_of)
    order, wanted = deal(weights, rows), Counter(deal(weights, rows))
    if short := {names[number]: share for number, share in enumerate(shares) if not share or share < wanted[number]}:
        _tell(short, sum(shares), len(sources))
        order = deal(shares, sum(shares))
    used = [number for number, share in enumerate(shares) if share]
    kind_of = torch.tensor([used.index(number) for number in order], dtype=torch.int64)
    known = torch.zeros(len(order), length, dtype=torch.int64)
    scored = torch.ones(len(order), length, dtype=torch.bool) if packed else None
    for kind, number in enumerate(used):
        if number in parts:
            known[kind_of == kind] = parts[number].tokens[: shares[number]]
            if scored is not None and (counting := parts[number].scored) is not None:
                scored[kind_of == kind] = counting[: shares[number]]
    return Calibration(
        reference=" ".join(options.text) if options.text else " ".join(source.reference for source in sources),
        kinds=tuple(names[number] for number in used),
        descriptions=tuple(texts[number].description if number in texts else _OWN_TEXT for number in used),
        kind_of=kind_of,
        known=known,
        frame=frame,
        author=author if any(sources[number].reference == SELF for number in used) else None,
        scored=scored,
    )


def _gathered(
    weights: Sequence[float], texts: Mapping[int, Text], rows: int, rows_of: Callable[[int, int], TokenRows]
) -> tuple[dict[int, TokenRows], list[int]]:
    """The rows of the named texts by their number, and how many rows every source gives.

    Raises: CalibrationTextError if no source has a whole row.
    """
    parts: dict[int, TokenRows] = {}
    available, empty = [rows] * len(weights), None
    while True:
        shares = shared_out(weights, rows, available)
        lacking = [number for number in texts if shares[number] > (parts[number].rows if number in parts else 0)]
        for number in lacking:
            try:
                parts[number] = rows_of(number, shares[number])
                had = parts[number].rows
            except CalibrationTextError as error:
                had, empty = 0, error
            if had < shares[number]:
                available[number] = had
        if not lacking:
            break
    if empty and not sum(shares):
        raise empty
    return parts, shares


def _tell(short: Mapping[str, int], rows: int, sources: int) -> None:
    """Say which of several texts give fewer rows than their share; a text alone gives what it has."""
    if sources > 1:
        found = ", ".join(f"{count} from {name}" for name, count in short.items())
        _log.warning(f"Of {rows} calibration rows only {found}, less than the share; the others fill up what they can.")


def _check_length(checkpoint: Checkpoint, length: int, option: str) -> None:
    """Refuse rows for which the model has no positions, and tell what rows of this length cannot show.

    Raises: OptionError.
    """
    limit, window = checkpoint.positions, getattr(checkpoint.config, "sliding_window", None)
    if limit is not None and length > limit:
        raise OptionError(f"{option}-length {length} exceeds the model's {limit} positions; lower it.")
    if window and length < window and len(set(checkpoint.attention_kinds)) > 1:
        _log.warning(
            f"Rows of {length} tokens are shorter than the sliding window of {window}, so blocks that see "
            f"everything look like those that do not; a {option}-length above the window would tell them apart."
        )
