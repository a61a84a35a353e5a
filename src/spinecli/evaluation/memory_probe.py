"""The process that `measure_memory` starts: load one model, run it once, print the peak resident memory.

Reads a request as JSON on stdin, prints one line `REPORT_MARK [peak, peak before loading, device peak]` in bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from spinecli.artifacts.stopwatch import peak_memory

REPORT_MARK = "spine-memory "
FAILURE_MARK = "spine-failure "
"""Before a sentence for the user, from a probe that knows why it cannot measure."""


def main() -> None:
    """Measure what stdin asks for."""
    request = json.load(sys.stdin)
    import torch

    from spinecli.evaluation.latency import random_prompt, time_forward, time_generation
    from spinecli.evaluation.models import load_model, open_subjects
    from spinecli.evaluation.quiet import quiet_libraries

    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    adapter = Path(request["adapter"]) if request["adapter"] else None
    (subject,) = open_subjects([(request["reference"], adapter)])
    with quiet_libraries():
        before = peak_memory() or 0
        model = load_model(subject, device=request["device"], dtype=request["dtype"])
        prompt = random_prompt(subject.vocabulary, request["prompt_length"], request["batch_size"], subject.opening)
        prompt = prompt.to(request["device"])
        if subject.classifies:
            time_forward(model, prompt)
        else:
            time_generation(model, prompt, request["new_tokens"])
    device = torch.device(request["device"])
    device_peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    sys.stdout.write(REPORT_MARK + json.dumps([peak_memory() or 0, before, device_peak]) + "\n")


if __name__ == "__main__":
    main()
