"""`spine bench` as a library call: models side by side in each engine, and the directory that tells of them."""

from __future__ import annotations

from spinecli.artifacts.directory import OutputOptions, check_output
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.evaluation.bench.config import BenchConfig
from spinecli.evaluation.bench.output import provenance, read_bench, run_of, write_bench
from spinecli.evaluation.bench.results import BenchResults
from spinecli.evaluation.bench.session import open_bench
from spinecli.evaluation.session import Listeners


def bench(
    config: BenchConfig,
    output: OutputOptions | None = None,
    listeners: Listeners | None = None,
    stopwatch: Stopwatch | None = None,
) -> tuple[BenchResults, Manifest | None]:
    """Measure everything, and write it if there is an `output`, whose manifest is returned.

    With `output.resume`, what the same benchmark has written there already is returned instead.

    Raises: OutputExistsError, MeasurementError, and every UserError that a model or an engine can cause.
    """
    if output and not output.resume:
        check_output(output)
    session = open_bench(config, listeners, stopwatch)
    if output is None:
        return session.measure(), None
    source = provenance(session.models)
    if finished := run_of(session, source).finished(output):
        return read_bench(output.path), finished
    check_output(output)
    results = session.measure()
    return results, write_bench(session, source, results, output)
