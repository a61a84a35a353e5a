from __future__ import annotations

import json
from pathlib import Path

import pytest

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import damaged_files, read_manifest
from spinecli.errors import OptionError, OutputExistsError
from spinecli.evaluation import run
from spinecli.evaluation.config import EvaluateConfig, PerplexityConfig
from spinecli.evaluation.results import Evaluation
from spinecli.evaluation.run import run_of, write_evaluation
from spinecli.evaluation.session import Session, open_session


def _session(dense: Path, thinner: Path, text_file: Path, **changes: object) -> Session:
    config = EvaluateConfig(
        model=str(thinner),
        against=(str(dense),),
        perplexity=PerplexityConfig(texts=(str(text_file),), window=32, rows=5),
        threads=1,
    )
    return open_session(config.model_copy(update=changes))


@pytest.fixture
def session(dense: Path, thinner: Path, text_file: Path) -> Session:
    return _session(dense, thinner, text_file)


def test_perplexity_alone_never_loads_a_model(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinecli.evaluation.session.load_model", None)
    evaluation = session.measure()
    assert {text.computed_by for model in evaluation.models for text in model.perplexity} == {"block stream"}


def test_streamed_and_loaded_sessions_agree(dense: Path, thinner: Path, text_file: Path, session: Session) -> None:
    streamed, loaded = session.measure(), _session(dense, thinner, text_file, latency=True).measure()
    for one, other in zip(streamed.models, loaded.models, strict=True):
        assert other.perplexity[0].computed_by == "loaded model"
        assert one.perplexity[0].nll == pytest.approx(other.perplexity[0].nll, abs=1e-6)


def test_everything_is_written_and_accounted_for(session: Session, tmp_path: Path, dense: Path, thinner: Path) -> None:
    evaluation = session.measure()
    manifest = write_evaluation(session, run_of(session), evaluation, OutputOptions(tmp_path / "out"))
    assert {"results.json", "report.html"} <= set(manifest.outputs)
    assert read_manifest(tmp_path / "out") == manifest
    assert damaged_files(tmp_path / "out", manifest) == {}
    assert manifest.kind == "evaluation"
    assert {name: source.reference for name, source in manifest.inputs.items() if name != "text 1"} == {
        "model": str(thinner),
        "against 1": str(dense),
    }
    stored = Evaluation.model_validate(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert stored == evaluation
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_is_kept_unless_it_may_be_replaced(session: Session, tmp_path: Path) -> None:
    evaluation, made, out = session.measure(), run_of(session), tmp_path / "out"
    first = write_evaluation(session, made, evaluation, OutputOptions(out))
    with pytest.raises(OutputExistsError):
        write_evaluation(session, made, evaluation, OutputOptions(out))
    assert read_manifest(out) == first
    write_evaluation(session, made, evaluation, OutputOptions(out, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_thrown_away(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    evaluation, made = session.measure(), run_of(session)
    whole_report = run.report_html
    monkeypatch.setattr(run, "report_html", killed)
    with pytest.raises(KeyboardInterrupt):
        write_evaluation(session, made, evaluation, OutputOptions(tmp_path / "out"))
    monkeypatch.setattr(run, "report_html", whole_report)
    assert [path.name for path in tmp_path.iterdir()] == [".out.spine-work"]
    manifest = write_evaluation(session, made, evaluation, OutputOptions(tmp_path / "out"))
    assert damaged_files(tmp_path / "out", manifest) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_windows_fit_the_shortest_model(dense: Path, text_file: Path) -> None:
    notes: list[str] = []
    texts = PerplexityConfig(texts=(str(text_file),))
    config = EvaluateConfig(model=str(dense), perplexity=texts)
    session = open_session(config, RunContext(note=notes.append))
    assert session.passages[0].windows[0].tokens.shape == (10, 96)
    assert notes == [
        "Windows have at most 96 tokens instead of 256, because dense has no more positions.",
        "words.txt has 10 windows, fewer than 40.",
    ]
    asked = texts.model_copy(update={"window": 97})
    with pytest.raises(OptionError, match="97 tokens exceed the 96 positions of dense; lower --window"):
        open_session(EvaluateConfig(model=str(dense), perplexity=asked))
