"""What a cut buys in the engines that run it: speed-up over dense in torch and llama.cpp, beside what shapes promise.

    python benchmarks/speed_engines.py [--threads 1] [--repeats 5]

Cuts english-7M (of ../shared, left out where that is absent) and a random Llama of about 110 M parameters by depth, by
width and by both, at the sparsity nearest to 0.3 that whole blocks reach, so that all cuts leave equally many
parameters. The library behind `spine bench` times prefill and greedy decoding of the dense model and its cuts in turns:
torch in float32, and llama.cpp with f16 and q8_0 files where it is installed. Each figure is the median of the ratios
within a round, with the lowest and the highest, and after the slash what is promised: the ratio of FLOPs for the
prefill, of the bytes that a step reads for decoding. `memory` is the ratio of peaks of a fresh process, less what it
takes before a model is loaded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from speed import make_checkpoint
from transformers.utils import logging as transformers_logging

from spinecli.artifacts.directory import OutputOptions
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.data.config import CalibrationConfig
from spinecli.evaluation.bench.config import BenchConfig, Engine
from spinecli.evaluation.bench.models import open_models
from spinecli.evaluation.bench.results import EngineResult, EngineRun, Speedup
from spinecli.evaluation.bench.session import open_bench
from spinecli.evaluation.config import GenerationConfig
from spinecli.exports.config import Quantization
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import open_request
from spinecli.pruning.run import prune

SPARSITY = 0.3
ENGLISH = Path(__file__).parents[2] / "shared" / "models" / "english-7M"
CUTS = {"depth": 1.0, "both": 0.5, "width": 0.0}
"""Share of the budget that is spent on whole blocks."""


def cut(model: Path, name: str, block_share: float, work: Path) -> Path:
    """A cut of the model; channels in multiples of 32, which is what rows of q8_0 are made of."""
    blocks = Checkpoint.open(model).blocks
    out = work / name
    options = PruneConfig(
        model=str(model),
        sparsity=round(SPARSITY * blocks) / blocks,
        method="comp",
        metric="m1",
        block_share=block_share,
        round_to=32,
        calibration=CalibrationConfig(text="builtin:tiny-calibration", rows=8),
    )
    prune(open_request(options), OutputOptions(out))
    return out


def measured(
    models: list[Path],
    generation: GenerationConfig,
    threads: int,
    engine: Engine,
    quantize: Quantization = Quantization.f16,
) -> EngineResult:
    """All models in one engine."""
    config = BenchConfig(
        models=tuple(map(str, models)), engine=engine, generation=generation, threads=threads, quantize=quantize
    )
    return open_bench(config).measure().engines[0]


def rows(name: str, dense: Path, generation: GenerationConfig, threads: int) -> Iterator[str]:
    """Cut, time, and the lines of the table."""
    with tempfile.TemporaryDirectory(prefix="spine-engines-") as folder:
        models = [dense, *(cut(dense, cut_name, share, Path(folder)) for cut_name, share in CUTS.items())]
        parameters = [
            facts.block_parameters for facts in (model.facts() for model in open_models(list(map(str, models))))
        ]
        engines = [measured(models, generation, threads, "torch")]
        if find_spec("llama_cpp"):
            engines += [
                measured(models, generation, threads, "llama.cpp", kind)
                for kind in (Quantization.f16, Quantization.q8_0)
            ]
        for engine in engines:
            first, *others = engine.runs
            yield line(name, engine, first, "dense", 0.0)
            for run, cut_name, left in zip(others, CUTS, parameters[1:], strict=True):
                yield line(name, engine, run, cut_name, 1 - left / parameters[0], first)


def line(
    name: str, engine: EngineResult, run: EngineRun, cut_name: str, removed: float, first: EngineRun | None = None
) -> str:
    """One line: rates of the dense model, ratios to them of a cut."""
    cells = [name, f"{engine.engine} {run.precision}", cut_name]
    if run.latency is None:
        raise ValueError("a language model has a latency")
    if first is None or run.speedups is None:
        prefill, decode = (f"{rate.median:.0f} tokens/s" for rate in (run.latency.prefill, run.latency.decode))
        cells += ["", prefill, decode, f"{run.memory.added_bytes / 1e6:.0f} MB"]
    else:
        memory = run.memory.added_bytes / first.memory.added_bytes
        cells += [f"{removed:.1%}", ratio(run.speedups.prefill), ratio(run.speedups.decode), f"{memory:.2f}"]
    return f"| {' | '.join(cells)} |"


def ratio(found: Speedup | None) -> str:
    """Measured with its range, and promised."""
    if found is None:
        raise ValueError("a language model has both speed-ups")
    spread = found.measured
    return f"{spread.median:.2f} ({spread.minimum:.2f} to {spread.maximum:.2f}) / {found.promised:.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    generation = GenerationConfig(prompt_length=128, new_tokens=32, repeats=arguments.repeats)
    print("| model | engine | cut | removed | prefill: measured / by FLOPs | decode: measured / by bytes | memory |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="spine-engines-") as folder:
        models = {"random-113M": make_checkpoint(Path(folder) / "random")}
        if ENGLISH.is_dir():
            models = {"english-7M": ENGLISH, **models}
        for name, dense in models.items():
            for text in rows(name, dense, generation, arguments.threads):
                print(text, flush=True)


if __name__ == "__main__":
    main()
