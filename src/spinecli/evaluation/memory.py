"""Peak memory of loading a model and generating or classifying with it, measured in a fresh process per model.

The measuring process itself cannot be asked: its peak covers every model it has held so far.
"""

from __future__ import annotations

import json
import subprocess
import sys

from spinecli.errors import MeasurementError
from spinecli.evaluation.memory_probe import REPORT_MARK
from spinecli.evaluation.models import Subject
from spinecli.evaluation.results import MemoryResult
from spinecli.evaluation.settings import DEFAULT_PROMPT_LENGTH, Settings


def measure_memory(subject: Subject, settings: Settings) -> MemoryResult:
    """Start a process that loads the model, runs it once, and reports its own peak.

    Raises: MeasurementError if that process dies, for want of memory for instance.
    """
    generation = settings.generation
    request = {
        "reference": str(subject.path.resolve()),
        "adapter": str(subject.adapter.resolve()) if subject.adapter else None,
        "device": settings.device,
        "dtype": settings.dtype,
        "threads": settings.threads,
        "prompt_length": generation.prompt_length or DEFAULT_PROMPT_LENGTH,
        "new_tokens": generation.new_tokens,
        "batch_size": generation.batch_size,
    }
    command = [sys.executable, "-m", "spinecli.evaluation.memory_probe"]
    finished = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    reports = [line for line in finished.stdout.splitlines() if line.startswith(REPORT_MARK)]
    if finished.returncode != 0 or not reports:
        reason = f"signal {-finished.returncode}" if finished.returncode < 0 else _last_line(finished.stderr)
        raise MeasurementError(
            f"The process that measures the memory of {subject.reference} ended early ({reason}); "
            "free some memory, or leave out --memory."
        )
    peak, before, device_peak = json.loads(reports[-1].removeprefix(REPORT_MARK))
    return MemoryResult(
        peak_bytes=peak, before_loading_bytes=before, added_bytes=peak - before, device_peak_bytes=device_peak
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else "no reason given"
