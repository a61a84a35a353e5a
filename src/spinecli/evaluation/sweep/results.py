"""What a sweep found, as records: the schema of sweep.json."""

from __future__ import annotations

from pydantic import JsonValue

from spinecli.artifacts.record import Record
from spinecli.evaluation.config import GenerationConfig

RESULTS_NAME = "sweep.json"
SWEEP_FORMAT = 1


class Speed(Record):
    """Tokens per second with a KV cache, medians over the rounds in which the model and the dense one took turns."""

    prefill: float
    decode: float
    dense_prefill: float
    """Of the dense model in the same rounds."""
    dense_decode: float
    prefill_ratio: float
    """Median over the rounds of this model's speed divided by the dense one's."""
    decode_ratio: float


class SweepRow(Record):
    """The figures of one model: the dense one, or one point of the sweep."""

    name: str
    method: str | None
    """As on the command line, with its widths; None of the dense model."""
    tuned: str | None
    """The method of `spine tune`; None if the cut was not tuned."""
    sparsity: float
    """Share of block parameters that was to be removed."""
    achieved_sparsity: float
    removed_blocks: int
    parameters: int
    """All parameters, a tied head counted once."""
    block_parameters: int
    bytes: int
    """Of the weight tensors as they are stored."""
    flops_per_token: int
    """Of one forward pass at a context of 256 tokens."""
    held_out: float
    """What `SweepResults.held_out_by` says, on calibration rows that recovery is not fitted to."""
    perplexity: dict[str, float]
    """By text, as the user named it."""
    speed: Speed | None
    """None if it was not measured."""


class Refusal(Record):
    """A point that cannot be: the cut was refused."""

    name: str
    method: str
    sparsity: float
    reason: str


class WindowRecord(Record):
    """How perplexity was taken on one text."""

    description: str
    windows: int
    window: int
    stride: int
    opened_by: str = ""
    """The special tokens in front of every window; empty if there are none."""


class SweepResults(Record):
    """The whole of sweep.json."""

    sweep_format: int = SWEEP_FORMAT
    model: str
    """As the user named it."""
    held_out_by: str
    texts: dict[str, WindowRecord]
    """By text, as the user named it."""
    generation: GenerationConfig | None
    """What was timed; None if nothing was."""
    machine: dict[str, JsonValue] | None
    """On which it was timed."""
    heal_tokens: int = 0
    """What every cut was trained on after it; 0 if it was not."""
    rows: tuple[SweepRow, ...]
    """The dense model first."""
    refused: tuple[Refusal, ...]

    @property
    def dense(self) -> SweepRow:
        """The model as it came."""
        return self.rows[0]

    @property
    def points(self) -> tuple[SweepRow, ...]:
        """The pruned models."""
        return self.rows[1:]
