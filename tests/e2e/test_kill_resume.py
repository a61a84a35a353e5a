"""A run that was killed goes on from where it was, and ends with the bytes of a run that was never killed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from killing import Moment, end_at, stage, there_is, work_of
from spine_process import Here, Step, run_step
from sums import contents

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.data.config import CalibrationConfig
from spinecli.pruning.config import PruneConfig, TuneConfig
from spinecli.pruning.recovery.tune import open_request as open_tune
from spinecli.pruning.recovery.tune import tune
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")

WRITING = there_is("files/config.json", "files/model.safetensors", "files/model.part")
PRUNE_MOMENTS = {
    "as it begins": there_is("run.json"),
    "in the scoring pass": there_is("state/scoring.safetensors"),
    "in the comparing pass": there_is("state/comparing*.safetensors"),
    "while writing": WRITING,
}
TUNE_MOMENTS = {
    "as it begins": there_is("run.json"),
    "in the tuning pass": there_is("state/tuning.safetensors"),
    "while writing": WRITING,
}
HEAL_MOMENTS = {
    "as it begins": there_is("run.json"),
    "when the dense model has been asked": there_is("state/teacher-00000.safetensors"),
    "in training": there_is("state/healing.safetensors"),
    "while writing": WRITING,
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, dense: Path, text: Path) -> Step:
    """A prune run with all its passes, undisturbed; long enough to be met in the middle of each."""
    calibration = ("--calibration", text, "--calibration-rows", 96, "--calibration-length", 64)
    return run_step(tmp_path_factory.mktemp("undisturbed") / "pruned", "prune", dense, "--sparsity", 0.4, *calibration)


@pytest.fixture(scope="module")
def searched_and_tuned(searched: Step) -> Step:
    return run_step(searched.out.parent / "tuned", "tune", searched.out)


@pytest.fixture(scope="module")
def searched_and_healed(searched: Step) -> Step:
    budget = ("--tokens", 8_000, "--text-length", 64, "--batch-size", 4)
    return run_step(searched.out.parent / "healed", "heal", searched.out, *budget)


def assert_resumes(undisturbed: Step, moment: Moment, out: Path, spine_here: Here) -> None:
    code, _ = end_at(moment, out, *undisturbed.arguments)
    assert code == -signal.SIGKILL, "the run ended before it was met"
    assert not out.exists()
    assert work_of(out).is_dir()
    done = spine_here(*undisturbed.arguments, "--out", out, "--resume")
    assert done.code == 0, done.stderr
    assert contents(out) == undisturbed.contents
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.slow
@pytest.mark.parametrize("moment", PRUNE_MOMENTS.values(), ids=PRUNE_MOMENTS.keys())
def test_killed_prune_resumes(searched: Step, moment: Moment, tmp_path: Path, spine_here: Here) -> None:
    assert_resumes(searched, moment, tmp_path / "out", spine_here)


@pytest.mark.slow
@pytest.mark.parametrize("moment", TUNE_MOMENTS.values(), ids=TUNE_MOMENTS.keys())
def test_killed_tune_resumes(searched_and_tuned: Step, moment: Moment, tmp_path: Path, spine_here: Here) -> None:
    assert_resumes(searched_and_tuned, moment, tmp_path / "out", spine_here)


@pytest.mark.slow
@pytest.mark.parametrize("moment", HEAL_MOMENTS.values(), ids=HEAL_MOMENTS.keys())
def test_killed_heal_resumes(searched_and_healed: Step, moment: Moment, tmp_path: Path, spine_here: Here) -> None:
    assert_resumes(searched_and_healed, moment, tmp_path / "out", spine_here)


@pytest.fixture
def killed(searched: Step, tmp_path: Path) -> Path:
    """The output path of a prune run that was killed in its scoring pass."""
    out = tmp_path / "out"
    code, _ = end_at(there_is("state/scoring.safetensors"), out, *searched.arguments)
    assert code == -signal.SIGKILL
    return out


@pytest.mark.slow
def test_without_resume_it_is_refused_by_name_and_with_overwrite_begun_anew(
    searched: Step, killed: Path, spine_here: Here
) -> None:
    done = spine_here(*searched.arguments, "--out", killed, "--quiet")
    assert done.code == 2
    assert done.stderr == (
        f"error: An unfinished run of {killed} was found; add --resume to continue it or --overwrite to start over.\n"
    )
    other = spine_here(*searched.arguments, "--sparsity", 0.3, "--out", killed, "--resume", "--quiet")
    assert other.code == 2
    assert "other options" in other.stderr
    assert stage(killed).startswith("scoring")
    anew = spine_here(*searched.arguments, "--out", killed, "--overwrite", "--quiet")
    assert anew.code == 0
    assert contents(killed) == searched.contents


@pytest.mark.slow
def test_interrupt_says_how_to_go_on(searched: Step, tmp_path: Path, spine_here: Here) -> None:
    out = tmp_path / "out"
    code, said = end_at(there_is("state/scoring.safetensors"), out, *searched.arguments, "--quiet", by=signal.SIGINT)
    assert code == 130
    assert said.startswith("error: Stopped")
    assert "--resume" in said
    assert said.count("\n") == 1
    assert spine_here(*searched.arguments, "--out", out, "--resume").code == 0
    assert contents(out) == searched.contents


@pytest.mark.slow
def test_a_killed_overwrite_leaves_the_old_output(
    pruned: Step, searched: Step, tmp_path: Path, spine_here: Here
) -> None:
    out = shutil.copytree(pruned.out, tmp_path / "out")
    arguments = (*searched.arguments, "--overwrite")
    assert end_at(WRITING, out, *arguments)[0] == -signal.SIGKILL
    assert contents(out) == pruned.contents
    assert spine_here(*arguments, "--out", out, "--resume").code == 0
    assert contents(out) == searched.contents


@pytest.mark.parametrize("moment", ["rename", "rmtree"])
def test_a_kill_within_the_swap_leaves_old_or_new_whole(
    moment: str, pruned: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spine_here: Here
) -> None:
    """The renames of an overwrite last microseconds, so the kill is put between them by hand."""
    out = tmp_path / "out"
    assert spine_here(*pruned.arguments, "--sparsity", 0.2, "--out", out).code == 0
    old = contents(out)

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    rename = Path.rename

    def rename_all_but_files(path: Path, target: Path) -> Path:
        return kill() if path.name == "files" else rename(path, target)  # type: ignore[func-returns-value]

    with monkeypatch.context() as patched:
        if moment == "rename":
            patched.setattr(Path, "rename", rename_all_but_files)
        else:
            patched.setattr(shutil, "rmtree", kill)
        with pytest.raises(Killed):
            spine_here(*pruned.arguments, "--out", out, "--overwrite")
    refused = spine_here(*pruned.arguments, "--out", out)
    assert refused.code == 2
    assert contents(out) == (old if moment == "rename" else pruned.contents)
    assert spine_here(*pruned.arguments, "--out", out, "--overwrite", "--resume").code == 0
    assert contents(out) == pruned.contents
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_second_process_is_refused(searched: Step, tmp_path: Path, spine_here: Here) -> None:
    out = tmp_path / "out"
    refused = []

    def second(work: Path) -> bool:
        if not (work / "run.json").exists():
            return False
        for option in ((), ("--resume",), ("--overwrite",)):
            refused.append(spine_here(*searched.arguments, "--out", out, "--quiet", *option))
        return True

    end_at(second, out, *searched.arguments)
    assert [done.code for done in refused] == [2, 2, 2]
    assert {done.stderr for done in refused} == {f"error: Another process is writing {out}; wait for it to end.\n"}


def test_a_finished_run_is_not_done_again(pruned: Step, spine_here: Here) -> None:
    before = (pruned.out / "spine.json").read_bytes()
    done = spine_here(*pruned.arguments, "--out", pruned.out, "--resume")
    assert done.code == 0
    assert done.json["achieved_sparsity"] == pruned.finished.json["achieved_sparsity"]
    assert (pruned.out / "spine.json").read_bytes() == before


class StoppedError(Exception):
    pass


class Watch:
    """A progress that keeps what it is told, and stops the run behind one block of one phase."""

    def __init__(self, last: tuple[str, int] | None = None) -> None:
        self.seen: list[tuple[str, int]] = []
        self.last = last

    def __call__(self, phase: str, done: int, total: int) -> None:
        self.seen.append((phase, done))
        if self.last == (phase, done):
            raise StoppedError


@pytest.mark.parametrize("phase", ["scoring blocks", "comparing blocks", "tuning"])
def test_a_pass_goes_on_behind_the_blocks_it_has_saved(
    phase: str, dense: Path, text: Path, pruned: Step, tmp_path: Path
) -> None:
    """Inside one process, where a run can be stopped at an exact block and its next one watched."""

    def run(watch: Watch, *, resume: bool) -> None:
        output, context = OutputOptions(tmp_path / "out", resume=resume), RunContext(progress=watch)
        if phase == "tuning":
            tune(open_tune(TuneConfig(pruned=pruned.out)), output, context)
        else:
            calibration = CalibrationConfig(text=str(text), rows=16, length=32)
            options = PruneConfig(model=str(dense), sparsity=0.4, calibration=calibration)
            prune(open_prune(options), output, context)

    with pytest.raises(StoppedError):
        run(Watch((phase, 4)), resume=False)
    name, _, saved = stage(tmp_path / "out").partition(", ")
    assert phase.startswith(name)
    blocks = int(saved.split()[0])
    assert 1 <= blocks <= 4
    watch = Watch()
    run(watch, resume=True)
    first = next(done for seen, done in watch.seen if seen == phase)
    assert first == blocks + 1
