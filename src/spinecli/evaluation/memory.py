"""Peak memory of loading a model and generating or classifying with it, measured in a fresh process per model.

The measuring process itself cannot be asked: its peak covers every model it has held so far.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

from pydantic import JsonValue

from spinecli.errors import MeasurementError
from spinecli.evaluation.config import EvaluateConfig
from spinecli.evaluation.memory_probe import FAILURE_MARK, REPORT_MARK
from spinecli.evaluation.models import Subject
from spinecli.evaluation.results import MemoryResult


def measure_memory(subject: Subject, config: EvaluateConfig) -> MemoryResult:
    """Start a process that loads the model, runs it once, and reports its own peak.

    Raises: MeasurementError if that process dies, for want of memory for instance.
    """
    generation = config.generation
    request: dict[str, JsonValue] = {
        "reference": str(subject.path.resolve()),
        "adapter": str(subject.adapter.resolve()) if subject.adapter else None,
        "device": config.device,
        "dtype": config.dtype,
        "threads": config.threads,
        "prompt_length": generation.length,
        "new_tokens": generation.new_tokens,
        "batch_size": generation.batch_size,
    }
    return run_probe("spinecli.evaluation.memory_probe", request, subject.reference)


def run_probe(module: str, request: Mapping[str, JsonValue], reference: str) -> MemoryResult:
    """Start `module` as a process of its own that does what `request` asks and reports its peak.

    Raises: MeasurementError with the sentence that the process leaves, or one that names the model as `reference` if
        it dies without one.
    """
    command = [sys.executable, "-m", module]
    finished = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    lines = finished.stdout.splitlines()
    if failures := [line for line in lines if line.startswith(FAILURE_MARK)]:
        raise MeasurementError(failures[0].removeprefix(FAILURE_MARK))
    reports = [line for line in lines if line.startswith(REPORT_MARK)]
    if finished.returncode != 0 or not reports:
        reason = f"signal {-finished.returncode}" if finished.returncode < 0 else _last_line(finished.stderr)
        raise MeasurementError(
            f"The process that measures the memory of {reference} ended early ({reason}); "
            "free some memory, or leave out this measure or this model."
        )
    peak, before, device_peak = json.loads(reports[-1].removeprefix(REPORT_MARK))
    return MemoryResult(
        peak_bytes=peak, before_loading_bytes=before, added_bytes=peak - before, device_peak_bytes=device_peak
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else "no reason given"
