"""Models in llama.cpp, each in a GGUF file: memory in a fresh process first, then speed with all of them in turns.

The order is on purpose: a file that makes llama.cpp abort ends the fresh process, not the benchmark.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
from pydantic import JsonValue

from spinecli.artifacts.context import RunContext
from spinecli.errors import MeasurementError, MissingPackageError, reason_of
from spinecli.evaluation.bench.cost import compared, spread
from spinecli.evaluation.bench.gguf_file import GgufFile
from spinecli.evaluation.bench.results import EngineResult, EngineRun, PromisedWork
from spinecli.evaluation.config import GenerationConfig
from spinecli.evaluation.latency import Seconds, generation_rates, random_prompt
from spinecli.evaluation.memory import run_probe
from spinecli.evaluation.results import LatencyResult, MemoryResult

PACKAGE = "llama-cpp-python"

# ggml's number for errors among the levels of its log
_ERROR_LEVEL = 4
# llama.cpp rounds the context of a sequence up to a multiple of this
_CONTEXT_STEP = 256


def import_llama_cpp() -> ModuleType:
    """The package's module of C functions.

    Raises: MissingPackageError if it is absent, cannot be loaded, or is too old for the functions used here.
    """
    # libraries that lack a shared object of the system fail with errors of their own
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingPackageError(
            f"llama.cpp needs {PACKAGE} ({_reason(error)}); install it with pip install {PACKAGE}."
        ) from error
    if not hasattr(llama_cpp, "llama_get_memory"):
        raise MissingPackageError(
            f"{PACKAGE} {llama_cpp.__version__} is too old to bench with; update it with pip install -U {PACKAGE}."
        )
    module: ModuleType = llama_cpp
    return module


@dataclass
class LlamaCppModel:
    """A model with a context for `batch` prompts of `length` tokens and what is generated after them."""

    api: ModuleType
    context: Any
    vocabulary: int
    prompt_batch: Any
    step_batch: Any
    rows: int
    length: int

    def prefill(self, prompt: Sequence[Sequence[int]]) -> list[int]:
        """Read `prompt`, (rows, length) token ids, into an empty cache; the likeliest next token of each row."""
        batch, last = self.prompt_batch, self.length - 1
        for row, tokens in enumerate(prompt):
            for position, token in enumerate(tokens):
                batch.token[row * self.length + position] = token
        self._decode(batch)
        return [self._likeliest(row * self.length + last) for row in range(self.rows)]

    def step(self, tokens: Sequence[int], position: int) -> list[int]:
        """Decode one token a row at `position`; the likeliest next token of each row."""
        for row, token in enumerate(tokens):
            self.step_batch.token[row] = token
            self.step_batch.pos[row] = position
        self._decode(self.step_batch)
        return [self._likeliest(row) for row in range(self.rows)]

    def generate(self, prompt: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Continue every row greedily by `new_tokens`, also beyond an end-of-text token: (rows, new_tokens)."""
        self.forget()
        tokens = self.prefill(prompt)
        found = [[token] for token in tokens]
        for index in range(new_tokens - 1):
            tokens = self.step(tokens, self.length + index)
            for row, token in zip(found, tokens, strict=True):
                row.append(token)
        return found

    def forget(self) -> None:
        """Empty the cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)

    def _decode(self, batch: Any) -> None:
        if code := self.api.llama_decode(self.context, batch):
            raise MeasurementError(f"llama.cpp stopped while it generated (code {code}); try fewer tokens.")

    def _likeliest(self, output: int) -> int:
        logits = self.api.llama_get_logits_ith(self.context, output)
        return int(numpy.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


@contextmanager
def load_llama_cpp(
    path: Path, *, reference: str, rows: int, length: int, new_tokens: int, threads: int, debug: bool = False
) -> Iterator[LlamaCppModel]:
    """Load a GGUF file on the CPU; everything is freed at the end.

    Args:
        reference: what the user calls the model.
        debug: llama.cpp's log goes to stderr.

    Raises: MissingPackageError, MeasurementError if llama.cpp cannot open the file or has no room for the context.
    """
    api = import_llama_cpp()
    with _logged(api, debug) as errors:
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = api.llama_model_load_from_file(str(path).encode(), settings)
        if not model:
            raise MeasurementError(
                f"llama.cpp cannot open {reference} ({_first(errors)}); leave it out, or update {PACKAGE}."
            )
        try:
            context = _context(api, model, rows, length, new_tokens, threads)
            if not context:
                raise MeasurementError(
                    f"llama.cpp has no room for {reference} ({_first(errors)}); lower --batch-size or --prompt-length."
                )
            batches = [_batch(api, rows, count) for count in (length, 1)]
            try:
                vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
                yield LlamaCppModel(api, context, vocabulary, batches[0], batches[1], rows, length)
            finally:
                for batch in batches:
                    api.llama_batch_free(batch)
                api.llama_free(context)
        finally:
            api.llama_model_free(model)


def _context(api: ModuleType, model: Any, rows: int, length: int, new_tokens: int, threads: int) -> Any:
    settings = api.llama_context_default_params()
    settings.n_ctx = rows * -(-(length + new_tokens) // _CONTEXT_STEP) * _CONTEXT_STEP
    settings.n_batch = rows * length
    settings.n_seq_max = rows
    settings.n_threads = settings.n_threads_batch = threads
    settings.offload_kqv = False
    settings.no_perf = True
    return api.llama_init_from_model(model, settings)


def _batch(api: ModuleType, rows: int, length: int) -> Any:
    """A batch of `length` tokens a row whose last ones are asked for logits; its token ids are yet to be set."""
    batch = api.llama_batch_init(rows * length, 0, 1)
    batch.n_tokens = rows * length
    for row in range(rows):
        for position in range(length):
            index = row * length + position
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            batch.logits[index] = position == length - 1
    return batch


@contextmanager
def _logged(api: ModuleType, debug: bool) -> Iterator[list[str]]:
    """llama.cpp's log kept from the terminal inside; what it said of errors."""
    errors: list[str] = []

    @api.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        said = text.decode(errors="replace")
        if level == _ERROR_LEVEL and said.strip():
            errors.append(said.strip())
        if debug:
            sys.stderr.write(said)

    api.llama_log_set(keep, ctypes.c_void_p(0))
    _held[:] = [keep]
    yield errors


# the function that llama.cpp calls, also after the last model is gone
_held: list[Any] = []


def _reason(error: Exception) -> str:
    """Why a package cannot be imported."""
    if isinstance(error, ModuleNotFoundError) and error.name == "llama_cpp":
        return "not installed"
    return reason_of(error)


def _first(errors: Sequence[str]) -> str:
    return errors[0].splitlines()[0].rstrip(".") if errors else "no reason given"


Prompt = list[list[int]]

_PROBE = "spinecli.evaluation.bench.llama_cpp_probe"


@dataclass(frozen=True)
class LabelledFile:
    """A GGUF file and what its model is called in the results."""

    label: str
    reference: str
    file: GgufFile


def bench_llama_cpp(
    files: Sequence[LabelledFile], generation: GenerationConfig, threads: int, context: RunContext
) -> EngineResult:
    """Measure all files, one run each, in their order.

    Raises: MissingPackageError, MeasurementError.
    """
    version = str(import_llama_cpp().__version__)
    length, batch = generation.length, generation.batch_size
    prompts = [random_prompt(each.file.vocabulary, length, batch, each.file.opening).tolist() for each in files]
    memories = []
    with context.stopwatch("llama.cpp memory"):
        for each, prompt in zip(files, prompts, strict=True):
            memories.append(_memory(each, prompt, generation.new_tokens, threads))
            context.progress("llama.cpp memory", len(memories), len(files))
    with context.stopwatch("llama.cpp latency"):
        latencies = _latencies(files, prompts, generation, threads, context)
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
    context: RunContext,
) -> list[LatencyResult]:
    rows, length, new_tokens = len(prompts[0]), len(prompts[0][0]), generation.new_tokens

    def report(phase: str, done: int, total: int) -> None:
        context.progress(f"llama.cpp {phase}", done, total)

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
                    debug=context.debug,
                )
            )
            timed.append(partial(time_llama_cpp, model, prompt, new_tokens))
        return generation_rates(timed, rows, length, generation, replace(context, progress=report))


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
