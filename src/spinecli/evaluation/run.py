"""`spine eval` as a library call: models side by side, and the directory that tells of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from pydantic import BaseModel, JsonValue

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions, check_output
from spinecli.artifacts.manifest import Manifest, Source, Step, lineage_behind, record_file
from spinecli.artifacts.run import Run
from spinecli.checkpoints.source import describe_source
from spinecli.data.rows import tokens_source
from spinecli.errors import UserError
from spinecli.evaluation.chain import commands_behind
from spinecli.evaluation.config import EvaluateConfig
from spinecli.evaluation.page.page import REPORT_NAME, Command
from spinecli.evaluation.plots import PICTURE_NAME, can_plot, save_picture
from spinecli.evaluation.report_page import report_html
from spinecli.evaluation.results import RESULTS_NAME, Evaluation
from spinecli.evaluation.session import Session, open_session
from spinecli.lora.peft_format import CONFIG_NAME, WEIGHTS_NAME

_Found = TypeVar("_Found", bound=BaseModel)


def run_of(session: Session) -> Run:
    """What decides an evaluation's result: its config, and the sums of everything that is measured or measured with.

    Reads every checkpoint once, so before measuring.

    Raises: DamagedArtifactError if a model's files are not those that its spine.json lists.
    """
    *others, main = session.subjects
    inputs = {"model": describe_source(main.reference, main.path)}
    for index, subject in enumerate(others, start=1):
        inputs[f"against {index}"] = describe_source(subject.reference, subject.path)
    if main.adapter:
        files = {name: record_file(main.adapter / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}
        inputs["adapter"] = Source(reference=str(main.adapter), files=files)
    for index, passage in enumerate(session.passages, start=1):
        inputs[f"text {index}"] = tokens_source(passage.text.reference, passage.windows[-1].tokens)
    if session.labelled:
        inputs["labelled examples"] = session.labelled.dataset.source()
    return Run(
        kind="evaluation",
        command="eval",
        config=session.asked,
        parameters=session.config.parameters(),
        seed=session.config.tasks.seed if session.config.tasks else 0,
        inputs=inputs,
        lineage=lineage_behind(main.path, inputs["model"]),
    )


def measured_once(
    run: Run,
    output: OutputOptions,
    kind: type[_Found],
    measure: Callable[[], _Found],
    write: Callable[[Run, _Found], Manifest],
) -> tuple[_Found, Manifest]:
    """What the same run has written into `output` already, if `output.resume` asks for it; else measured, and written.

    Raises: OutputExistsError, and what measuring and writing raise.
    """
    if finished := run.finished(output):
        return kind.model_validate_json((output.path / RESULTS_NAME).read_text(encoding="utf-8")), finished
    check_output(output)
    found = measure()
    return found, write(run, found)


def write_evaluation(session: Session, run: Run, evaluation: Evaluation, output: OutputOptions) -> Manifest:
    """Write the output directory, whole or not at all.

    Nothing is written while measuring, so a killed evaluation leaves nothing. What a kill in the moment of writing
    leaves is thrown away by the next run, because there is no measurement in it to continue.

    Raises: OutputExistsError, UnfinishedRunError (another process is writing), MissingPathError, NoSpaceError.
    """
    measured = session.context.stopwatch.measured()
    check_output(output)
    with run.working(replace(output, overwrite=True)) as work:
        text = json.dumps(evaluation.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (work.files / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
        own = Command(run.config.command_line(run.command, str(output.path)))
        commands = (*commands_behind(_steps(session, run)), own)
        (work.files / REPORT_NAME).write_text(report_html(evaluation, measured.started, commands), encoding="utf-8")
        if can_plot():
            save_picture(evaluation, work.files / PICTURE_NAME)
        report: dict[str, JsonValue] = {"comparison": [row.model_dump(mode="json") for row in evaluation.comparison]}
        return run.publish(work, _summary(evaluation), report, measured)


def _steps(session: Session, run: Run) -> tuple[Step, ...]:
    """The steps behind all models, as far as their files are those that their commands wrote."""
    found: list[Step] = []
    for index, subject in enumerate(session.subjects[:-1], start=1):
        try:
            found += lineage_behind(subject.path, run.inputs[f"against {index}"])
        except UserError:  # a model to compare with may be anything
            continue
    return (*found, *run.lineage)


def _summary(evaluation: Evaluation) -> str:
    model = evaluation.models[-1]
    found = [f"perplexity {text.perplexity:.4g} on {text.description}" for text in model.perplexity]
    if model.classification is not None:
        found.append(f"accuracy {model.classification.accuracy:.1%} on {model.classification.description}")
    others = [other.label for other in evaluation.models[:-1]]
    against = f" against {', '.join(others)}" if others else ""
    return f"{model.label}{against}" + (f": {', '.join(found)}" if found else "")


def evaluate(
    config: EvaluateConfig, output: OutputOptions | None = None, context: RunContext | None = None
) -> tuple[Evaluation, Manifest | None]:
    """Measure everything, and write it if there is an `output`, whose manifest is returned.

    With `output.resume`, what the same evaluation has written there already is returned instead.

    Raises: OutputExistsError, MeasurementError, NonFiniteWeightsError, OptionError, and every UserError that a model,
    text, data set or task can cause.
    """
    if output and not output.resume:
        check_output(output)
    session = open_session(config, context)
    if output is None:
        return session.measure(), None

    def write(run: Run, evaluation: Evaluation) -> Manifest:
        return write_evaluation(session, run, evaluation, output)

    return measured_once(run_of(session), output, Evaluation, session.measure, write)
