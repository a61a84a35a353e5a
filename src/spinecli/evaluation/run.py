"""`spine eval` as a library call: models side by side, and the directory that tells of them."""

from __future__ import annotations

from spinecli.artifacts.directory import OutputOptions, check_output
from spinecli.artifacts.manifest import Manifest
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.evaluation.config import EvaluateConfig
from spinecli.evaluation.output import provenance, read_evaluation, run_of, write_evaluation
from spinecli.evaluation.results import Evaluation
from spinecli.evaluation.session import Listeners, open_session


def evaluate(
    config: EvaluateConfig,
    output: OutputOptions | None = None,
    listeners: Listeners | None = None,
    stopwatch: Stopwatch | None = None,
) -> tuple[Evaluation, Manifest | None]:
    """Measure everything, and write it if there is an `output`, whose manifest is returned.

    With `output.resume`, what the same evaluation has written there already is returned instead.

    Raises: OutputExistsError, MeasurementError, NonFiniteWeightsError, OptionError, and every UserError that a model,
    text, data set or task can cause.
    """
    if output and not output.resume:
        check_output(output)
    session = open_session(config, listeners, stopwatch)
    if output is None:
        return session.measure(), None
    source = provenance(session)
    if finished := run_of(session, source).finished(output):
        return read_evaluation(output.path), finished
    check_output(output)
    evaluation = session.measure()
    return evaluation, write_evaluation(session, source, evaluation, output)
