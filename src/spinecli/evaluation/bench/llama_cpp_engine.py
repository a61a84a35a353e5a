"""Models in llama.cpp, each in a GGUF file: memory in a fresh process first, then speed with all of them in turns.

The order is on purpose: a file that makes llama.cpp abort ends the fresh process, not the benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from pydantic import JsonValue

from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.evaluation.bench.cost import compared, spread
from spinecli.evaluation.bench.gguf_file import GgufFile
from spinecli.evaluation.bench.llama_cpp_model import LlamaCppModel, import_llama_cpp, load_llama_cpp
from spinecli.evaluation.bench.results import EngineResult, EngineRun, PromisedWork
from spinecli.evaluation.config import GenerationConfig
from spinecli.evaluation.latency import Seconds, generation_rates, random_prompt
from spinecli.evaluation.memory import run_probe
from spinecli.evaluation.results import LatencyResult, MemoryResult
from spinecli.evaluation.session import Listeners

Prompt = list[list[int]]

_PROBE = "spinecli.evaluation.bench.llama_cpp_probe"


@dataclass(frozen=True)
class LabelledFile:
    """A GGUF file and what its model is called in the results."""

    label: str
    reference: str
    file: GgufFile


def bench_llama_cpp(
    files: Sequence[LabelledFile],
    generation: GenerationConfig,
    threads: int,
    listeners: Listeners,
    stopwatch: Stopwatch,
) -> EngineResult:
    """Measure all files, one run each, in their order.

    Raises: MissingPackageError, MeasurementError.
    """
    version = str(import_llama_cpp().__version__)
    length, batch = generation.length, generation.batch_size
    prompts = [random_prompt(each.file.vocabulary, length, batch, each.file.opening).tolist() for each in files]
    memories = []
    with stopwatch("llama.cpp memory"):
        for each, prompt in zip(files, prompts, strict=True):
            memories.append(_memory(each, prompt, generation.new_tokens, threads))
            listeners.progress("llama.cpp memory", len(memories), len(files))
    with stopwatch("llama.cpp latency"):
        latencies = _latencies(files, prompts, generation, threads, listeners)
    runs = [
        _run(each, generation, memory, latency)
        for each, memory, latency in zip(files, memories, latencies, strict=True)
    ]
    return EngineResult(engine="llama.cpp", version=f"llama-cpp-python {version}", runs=compared(runs))


def time_llama_cpp(model: LlamaCppModel, prompt: Prompt, new_tokens: int) -> Seconds:
    """Generate greedily once; the first of the new tokens comes from the prefill, the others are decoded."""
    model.forget()
    start = time.perf_counter()
    tokens = model.prefill(prompt)
    prefilled = time.perf_counter()
    for index in range(new_tokens - 1):
        tokens = model.step(tokens, model.length + index)
    return Seconds(prefilled - start, time.perf_counter() - prefilled)


def _latencies(
    files: Sequence[LabelledFile],
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    threads: int,
    listeners: Listeners,
) -> list[LatencyResult]:
    rows, length, new_tokens = len(prompts[0]), len(prompts[0][0]), generation.new_tokens

    def report(phase: str, done: int, total: int) -> None:
        listeners.progress(f"llama.cpp {phase}", done, total)

    with ExitStack() as loaded:
        timed = []
        for each, prompt in zip(files, prompts, strict=True):
            model = loaded.enter_context(
                load_llama_cpp(
                    each.file.path,
                    reference=each.reference,
                    rows=rows,
                    length=length,
                    new_tokens=new_tokens,
                    threads=threads,
                    debug=listeners.debug,
                )
            )
            timed.append(partial(time_llama_cpp, model, prompt, new_tokens))
        return generation_rates(timed, rows, length, generation, report)


def _memory(each: LabelledFile, prompt: Prompt, new_tokens: int, threads: int) -> MemoryResult:
    request: dict[str, JsonValue] = {
        "file": str(each.file.path.resolve()),
        "reference": each.reference,
        "prompt": [[*row] for row in prompt],
        "new_tokens": new_tokens,
        "threads": threads,
    }
    return run_probe(_PROBE, request, each.reference)


def _run(each: LabelledFile, generation: GenerationConfig, memory: MemoryResult, latency: LatencyResult) -> EngineRun:
    length, batch = generation.length, generation.batch_size
    cost = each.file.cost()
    return EngineRun(
        label=each.label,
        precision=each.file.precision,
        weight_bytes=each.file.weight_bytes,
        memory=memory,
        work=PromisedWork(
            pass_flops=cost.prefill_flops(length, batch),
            step_bytes=cost.decode_bytes(length, generation.new_tokens, batch),
        ),
        pass_seconds=spread([batch * length / rate for rate in latency.prefill.samples]),
        latency=latency,
        forward=None,
    )
