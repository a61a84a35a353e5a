"""Speed of a classifier's forward pass, in rows and in tokens per second, with the models in turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spinecli.evaluation.latency import in_turns, rates, seconds_now
from spinecli.evaluation.results import ForwardResult
from spinecli.evaluation.settings import GenerationSettings
from spinecli.progress import Progress, silent


@torch.no_grad()
def time_forward(model: nn.Module, rows: Tensor) -> float:
    """Seconds of one forward pass over `rows`, (batch, length) int64 on the model's device, without padding."""
    start = seconds_now(rows.device)
    model(input_ids=rows, attention_mask=torch.ones_like(rows))
    return seconds_now(rows.device) - start


def measure_forward(
    models: Sequence[nn.Module], rows: Sequence[Tensor], settings: GenerationSettings, progress: Progress = silent
) -> list[ForwardResult]:
    """Time all models in turns; one result a model, in their order.

    `rows` holds one a model, all (batch, length) int64, on the models' device.
    """
    passes = [partial(time_forward, model, own) for model, own in zip(models, rows, strict=True)]
    taken = in_turns(passes, settings, progress)
    batch, tokens = len(rows[0]), rows[0].numel()
    return [
        ForwardResult(
            rows=rates([batch / seconds for seconds in series]), tokens=rates([tokens / seconds for seconds in series])
        )
        for series in taken
    ]
