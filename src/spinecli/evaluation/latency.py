"""Speed of a model with a KV cache: prefill and greedy decoding, in tokens per second.

    prompt (batch, prompt_length) ──prefill──▶ first token ──decode step──▶ … ──▶ new_tokens tokens
           batch * prompt_length tokens / s       batch * (new_tokens - 1) tokens / s

The models take turns (A B A B …), so that whatever else the machine does falls on all of them, and the ratio of two
models is the median of the ratios within each turn.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spinecli.artifacts.context import RunContext
from spinecli.evaluation.config import GenerationConfig
from spinecli.evaluation.results import ForwardResult, LatencyResult, Rates

_Timed = TypeVar("_Timed")


@dataclass(frozen=True)
class Seconds:
    """Wall-clock time of one generation."""

    prefill: float
    decode: float


def random_prompt(vocabulary: int, length: int, batch_size: int, opening: Sequence[int] = ()) -> Tensor:
    """Token ids to time with, always the same: (batch_size, length) int64. What they say does not change the time.

    Args:
        opening: special tokens that a prompt begins with, as far as it has room for them.
    """
    prompt = torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))
    kept = torch.tensor(opening[:length], dtype=torch.int64)
    prompt[:, : len(kept)] = kept
    return prompt


@torch.no_grad()
def time_generation(model: nn.Module, prompt: Tensor, new_tokens: int) -> Seconds:
    """Generate greedily once after `prompt`, (batch, prompt_length) int64 on the model's device.

    The first of the new tokens, of which there must be at least 2, comes from the prefill; the others are decoded.
    """
    # like generate(), compute the head for the last position only, wherever the architecture can
    last_only: dict[str, Any] = {"logits_to_keep": 1} if _keeps_last_logits(model) else {}
    start = seconds_now(prompt.device)
    output = model(input_ids=prompt, use_cache=True, **last_only)
    token = output.logits[:, -1:].argmax(dim=-1)
    prefilled = seconds_now(prompt.device)
    for _ in range(new_tokens - 1):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return Seconds(prefilled - start, seconds_now(prompt.device) - prefilled)


def measure_latency(
    models: Sequence[nn.Module], prompts: Sequence[Tensor], config: GenerationConfig, context: RunContext | None = None
) -> list[LatencyResult]:
    """Time all models in turns; one result a model, in their order.

    `prompts` holds one a model, all (batch, prompt_length) int64, on the models' device.
    """
    generations = [
        partial(time_generation, model, prompt, config.new_tokens)
        for model, prompt in zip(models, prompts, strict=True)
    ]
    batch, length = prompts[0].shape
    return generation_rates(generations, batch, length, config, context)


def generation_rates(
    generations: Sequence[Callable[[], Seconds]],
    batch: int,
    length: int,
    config: GenerationConfig,
    context: RunContext | None = None,
) -> list[LatencyResult]:
    """Run generations in turns, each of which times itself; one result each, in their order.

    Each continues `batch` prompts of `length` tokens by `config.new_tokens`.
    """
    taken = in_turns(generations, config, context)
    decoded = batch * (config.new_tokens - 1)
    return [
        LatencyResult(
            prefill=rates([batch * length / seconds.prefill for seconds in series]),
            decode=rates([decoded / seconds.decode for seconds in series]),
        )
        for series in taken
    ]


def in_turns(
    timed: Sequence[Callable[[], _Timed]], config: GenerationConfig, context: RunContext | None = None
) -> list[list[_Timed]]:
    """Call everything once a round, in order; what each returned in the rounds that count."""
    context, rounds = context or RunContext(), config.warmup + config.repeats
    taken: list[list[_Timed]] = [[] for _ in timed]
    for turn in range(rounds):
        for index, measure in enumerate(timed):
            found = measure()
            if turn >= config.warmup:
                taken[index].append(found)
            context.progress("latency", turn * len(timed) + index + 1, rounds * len(timed))
    return taken


def rates(samples: Sequence[float]) -> Rates:
    """Median, minimum and maximum of what was done per second."""
    return Rates(median=median(samples), minimum=min(samples), maximum=max(samples), samples=tuple(samples))


def paired_ratio(samples: Rates, reference: Rates) -> float:
    """Median over the rounds of (this model's rate / the reference's rate in the same round)."""
    return median(own / other for own, other in zip(samples.samples, reference.samples, strict=True))


def _keeps_last_logits(model: nn.Module) -> bool:
    bare: Any = getattr(model, "get_base_model", lambda: model)()
    return "logits_to_keep" in inspect.signature(type(bare).forward).parameters


def seconds_now(device: torch.device) -> float:
    """The clock, after everything queued on an accelerator has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@torch.no_grad()
def time_forward(model: nn.Module, rows: Tensor) -> float:
    """Seconds of one forward pass over `rows`, (batch, length) int64 on the model's device, without padding."""
    start = seconds_now(rows.device)
    model(input_ids=rows, attention_mask=torch.ones_like(rows))
    return seconds_now(rows.device) - start


def measure_forward(
    models: Sequence[nn.Module], rows: Sequence[Tensor], config: GenerationConfig, context: RunContext | None = None
) -> list[ForwardResult]:
    """Time all models in turns; one result a model, in their order.

    `rows` holds one a model, all (batch, length) int64, on the models' device.
    """
    passes = [partial(time_forward, model, own) for model, own in zip(models, rows, strict=True)]
    taken = in_turns(passes, config, context)
    batch, tokens = len(rows[0]), rows[0].numel()
    return [
        ForwardResult(
            rows=rates([batch / seconds for seconds in series]), tokens=rates([tokens / seconds for seconds in series])
        )
        for series in taken
    ]
