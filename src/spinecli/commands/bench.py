"""`spine bench`: speed and memory of models side by side, in the engines that would run them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spinecli.commands import options
from spinecli.console import Terminal, table

if TYPE_CHECKING:
    from rich.console import Group

    from spinecli.evaluation.bench.results import BenchResults, Engine


class EngineChoice(str, Enum):
    """Which engines run."""

    torch = "torch"
    llama_cpp = "llama.cpp"
    all = "all"


class Quantize(str, Enum):
    """How a checkpoint's weights are stored for llama.cpp."""

    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT",
            help="Directories, hub ids, builtin:tiny, or .gguf files. Ratios are to the first.",
        ),
    ],
    engine: Annotated[
        EngineChoice | None,
        typer.Option(
            "--engine",
            help="What runs the models. Default: torch, and llama.cpp too where llama-cpp-python is installed.",
            show_default=False,
        ),
    ] = None,
    prompt_length: Annotated[
        int | None,
        typer.Option(
            "--prompt-length", help="Tokens before generation, or of a classifier's row. Default: 128.", min=1
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens generated.", min=2)] = 32,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Sequences generated or classified together.", min=1)
    ] = 1,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds, after one to warm up.", min=1)] = 5,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads of either engine. Default: torch's choice.", min=1)
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where torch computes: cpu, cuda, cuda:1, mps. llama.cpp uses the CPU.")
    ] = "cpu",
    dtype: Annotated[options.Dtype, typer.Option("--dtype", help="Precision of torch.")] = options.Dtype.float32,
    quantize: Annotated[
        Quantize, typer.Option("--quantize", help="How llama.cpp gets a checkpoint's weights. A .gguf stays as it is.")
    ] = Quantize.f16,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for results.json.")] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure speed and memory of models side by side on this machine, in torch and in llama.cpp.

    [bold]spine bench dense/ pruned/[/bold]

    [bold]spine bench dense/ pruned/ pruned-q8.gguf --engine llama.cpp --threads 4[/bold]
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        from spinecli.artifacts.directory import OutputOptions, check_output
        from spinecli.evaluation.bench.models import open_models
        from spinecli.evaluation.bench.output import provenance, write_bench
        from spinecli.evaluation.bench.results import BenchConfig
        from spinecli.evaluation.bench.session import open_bench
        from spinecli.evaluation.session import Listeners
        from spinecli.evaluation.settings import GenerationConfig

        output = OutputOptions(out, overwrite=overwrite) if out else None
        if output:
            check_output(output)
        settings = BenchConfig(
            generation=GenerationConfig(
                prompt_length=prompt_length, new_tokens=new_tokens, batch_size=batch_size, repeats=repeats
            ),
            device=device,
            dtype=dtype.value,
            quantize=quantize.value,
            threads=threads,
        )
        with terminal.progress() as progress:
            listeners = Listeners(progress, terminal.note, debug)
            opened = open_bench(open_models(models), settings, _engines(engine), listeners)
            source = provenance(opened.models) if output else None
            results = opened.measure()
        if output and source:
            manifest = write_bench(opened, source, results, output)
            terminal.note(f"Wrote {', '.join(manifest.outputs)} to {output.path}.")
        terminal.result(results.model_dump(mode="json"), _tables(results))


def _engines(choice: EngineChoice | None) -> tuple[Engine, ...] | None:
    if choice is None:
        return None
    from spinecli.evaluation.bench.results import ENGINES

    return tuple(engine for engine in ENGINES if choice is EngineChoice.all or engine == choice.value)


def _tables(results: BenchResults) -> Group:
    """One table an engine, with a column a model; how it was measured stands below."""
    from rich.console import Group
    from rich.text import Text

    from spinecli.evaluation.bench.report import conditions, lines, title

    drawn = [
        part
        for engine in results.engines
        for part in (table(title(engine), ("", *(run.label for run in engine.runs)), lines(engine)), Text())
    ]
    return Group(*drawn, Text("\n".join(conditions(results)), style="dim"))
