"""The process that measures llama.cpp's memory: load one GGUF file, generate once, print the peak resident memory.

Reads a request as JSON on stdin, prints one line `REPORT_MARK [peak, peak before loading, null]` in bytes, or
`FAILURE_MARK` and what llama.cpp refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from spinecli.artifacts.stopwatch import peak_memory
from spinecli.errors import SpineError
from spinecli.evaluation.bench.llama_cpp_engine import import_llama_cpp, load_llama_cpp
from spinecli.evaluation.memory_probe import FAILURE_MARK, REPORT_MARK


def main() -> None:
    """Measure what stdin asks for."""
    request = json.load(sys.stdin)
    prompt, new_tokens = request["prompt"], request["new_tokens"]
    try:
        import_llama_cpp()
        before = peak_memory() or 0
        with load_llama_cpp(
            Path(request["file"]),
            reference=request["reference"],
            rows=len(prompt),
            length=len(prompt[0]),
            new_tokens=new_tokens,
            threads=request["threads"],
        ) as model:
            model.generate(prompt, new_tokens)
            sys.stdout.write(REPORT_MARK + json.dumps([peak_memory() or 0, before, None]) + "\n")
    except SpineError as error:
        sys.stdout.write(f"{FAILURE_MARK}{error}\n")


if __name__ == "__main__":
    main()
