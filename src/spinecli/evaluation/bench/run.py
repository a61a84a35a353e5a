"""`spine bench` as a library call: models side by side in each engine, and the directory that tells of them."""

from __future__ import annotations

from spinecli.artifacts.directory import OutputOptions, check_output
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.evaluation.bench.config import BenchConfig
from spinecli.evaluation.bench.output import provenance, write_bench
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

    Raises: OutputExistsError, MeasurementError, and every UserError that a model or an engine can cause.
    """
    if output:
        check_output(output)
    session = open_bench(config, listeners, stopwatch)
    source = provenance(session.models) if output else None
    results = session.measure()
    if output is None or source is None:
        return results, None
    return results, write_bench(session, source, results, output)
