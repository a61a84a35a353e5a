"""`spine bench` as a library call: models side by side in each engine, and the directory that tells of them."""

from __future__ import annotations

import json
from dataclasses import replace

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions, check_output
from spinecli.artifacts.manifest import Manifest, Source, Step, lineage_behind, record_file
from spinecli.artifacts.run import Run
from spinecli.checkpoints.source import describe_source
from spinecli.evaluation.bench.config import BenchConfig
from spinecli.evaluation.bench.gguf_file import GgufFile
from spinecli.evaluation.bench.models import Model
from spinecli.evaluation.bench.report import bench_html
from spinecli.evaluation.bench.results import BenchResults
from spinecli.evaluation.bench.session import BenchSession, open_bench
from spinecli.evaluation.chain import commands_behind
from spinecli.evaluation.page.page import REPORT_NAME, Command
from spinecli.evaluation.results import RESULTS_NAME
from spinecli.evaluation.run import measured_once


def run_of(bench: BenchSession) -> Run:
    """What decides a benchmark's result, but for the machine: its config, and the sums of all models.

    Reads every file once, so before measuring. The lineage is that of the last checkpoint.

    Raises: DamagedArtifactError if a checkpoint's files are not those that its spine.json lists.
    """
    inputs: dict[str, Source] = {}
    lineage: tuple[Step, ...] = ()
    for index, model in enumerate(bench.models, start=1):
        inputs[f"model {index}"] = source = _source(model)
        if model.subject is not None:
            lineage = lineage_behind(model.subject.path, source)
    return Run(
        kind="benchmark",
        command="bench",
        config=bench.asked,
        parameters=bench.config.parameters(),
        seed=0,
        inputs=inputs,
        lineage=lineage,
    )


def write_bench(bench: BenchSession, run: Run, results: BenchResults, output: OutputOptions) -> Manifest:
    """Write the output directory, whole or not at all.

    Raises: OutputExistsError, UnfinishedRunError (another process is writing), MissingPathError, NoSpaceError.
    """
    measured = bench.context.stopwatch.measured()
    check_output(output)
    # nothing is written while measuring, so what a kill leaves here holds nothing to continue
    with run.working(replace(output, overwrite=True)) as work:
        text = json.dumps(results.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (work.files / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
        commands = (*commands_behind(run.lineage), Command(run.config.command_line(run.command, str(output.path))))
        (work.files / REPORT_NAME).write_text(bench_html(results, measured.started, commands), encoding="utf-8")
        labels = ", ".join(model.label for model in results.models)
        engines = " and ".join(engine.engine for engine in results.engines)
        return run.publish(work, f"{labels} in {engines}", {}, measured)


def _source(model: Model) -> Source:
    if isinstance(model.source, GgufFile):
        path = model.source.path
        return Source(reference=model.reference, files={path.name: record_file(path)})
    return describe_source(model.reference, model.source.path)


def bench(
    config: BenchConfig, output: OutputOptions | None = None, context: RunContext | None = None
) -> tuple[BenchResults, Manifest | None]:
    """Measure everything, and write it if there is an `output`, whose manifest is returned.

    With `output.resume`, what the same benchmark has written there already is returned instead.

    Raises: OutputExistsError, MeasurementError, and every UserError that a model or an engine can cause.
    """
    if output and not output.resume:
        check_output(output)
    session = open_bench(config, context)
    if output is None:
        return session.measure(), None

    def write(run: Run, results: BenchResults) -> Manifest:
        return write_bench(session, run, results, output)

    return measured_once(run_of(session), output, BenchResults, session.measure, write)
