from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_artifacts_manifest import manifest

import spinecli.artifacts.directory as directory_module
from spinecli.artifacts.directory import (
    OutputOptions,
    WorkDirectory,
    check_output,
    fingerprint_of,
    finished_run,
    require_space,
    work_directory,
)
from spinecli.artifacts.manifest import MANIFEST_NAME, read_manifest, record_files
from spinecli.errors import MissingPathError, NoSpaceError, OptionError, OutputExistsError, UnfinishedRunError

FINGERPRINT = {"command": "prune"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def work_of(out: Path) -> Path:
    return out.parent / f".{out.name}.spine-work"


def publish(options: OutputOptions, content: str = "content") -> None:
    with work_directory(options, FINGERPRINT) as work:
        (work.files / "file").write_text(content)
        work.publish(manifest(outputs=record_files(work.files)))


def interrupt(options: OutputOptions, error: BaseException, fingerprint: dict[str, str] | None = None) -> None:
    with pytest.raises(type(error)), work_directory(options, fingerprint or FINGERPRINT) as work:  # noqa: PT012
        (work.state / "half").write_text("done")
        raise error


def test_output_appears_whole_and_nothing_is_left_beside_it(out: Path) -> None:
    with work_directory(OutputOptions(out), FINGERPRINT) as work:
        (work.files / "file").write_text("content")
        (work.state / "scratch").write_text("")
        assert not out.exists()
        work.publish(manifest(outputs=record_files(work.files)))
    assert {path.name for path in out.iterdir()} == {"file", MANIFEST_NAME}
    assert read_manifest(out).digest == manifest(outputs=record_files(out)).computed_digest()
    assert list(out.parent.iterdir()) == [out]


def test_overwrite_spares_files_that_someone_put_into_an_output(out: Path) -> None:
    publish(OutputOptions(out))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="did not write"):
        check_output(OutputOptions(out, overwrite=True))


def test_a_user_error_removes_the_work_it_began(out: Path) -> None:
    interrupt(OutputOptions(out), OptionError("wrong"))
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("crash"), MemoryError()])
def test_any_other_interruption_keeps_the_work(out: Path, error: BaseException) -> None:
    interrupt(OutputOptions(out), error)
    assert (work_of(out) / "state" / "half").read_text() == "done"
    with work_directory(OutputOptions(out, resume=True), FINGERPRINT) as work:
        assert (work.state / "half").read_text() == "done"


def test_a_user_error_in_a_resumed_run_keeps_the_work(out: Path) -> None:
    interrupt(OutputOptions(out), KeyboardInterrupt())
    interrupt(OutputOptions(out, resume=True), OptionError("wrong"))
    assert (work_of(out) / "state" / "half").exists()


def test_unfinished_work_needs_a_word_from_the_user(out: Path) -> None:
    interrupt(OutputOptions(out), KeyboardInterrupt())
    with pytest.raises(UnfinishedRunError, match=r"--resume .* --overwrite"):
        publish(OutputOptions(out))


def test_resume_is_for_the_same_command_only(out: Path) -> None:
    interrupt(OutputOptions(out), KeyboardInterrupt())
    with pytest.raises(UnfinishedRunError, match="other options or inputs"):
        interrupt(OutputOptions(out, resume=True), AssertionError(), {"command": "tune"})
    assert (work_of(out) / "state" / "half").exists()


def test_overwrite_drops_unfinished_work(out: Path) -> None:
    interrupt(OutputOptions(out), KeyboardInterrupt())
    with work_directory(OutputOptions(out, overwrite=True), {"command": "tune"}) as work:
        assert not (work.state / "half").exists()


def test_remains_of_a_published_run_do_not_stand_in_the_way(out: Path) -> None:
    interrupt(OutputOptions(out), KeyboardInterrupt())
    (work_of(out) / "files").rename(out)
    out.rename(out.parent / "moved away")
    publish(OutputOptions(out))
    assert (out / "file").exists()


def test_work_without_a_marker_is_begun_anew(out: Path) -> None:
    """A kill before run.json was in place leaves nothing worth continuing."""
    work_of(out).mkdir()
    (work_of(out) / "files").mkdir()
    publish(OutputOptions(out, resume=True))
    assert (out / "file").exists()


def test_overwrite_replaces_an_output_of_ours_only_when_asked(out: Path) -> None:
    publish(OutputOptions(out), "old")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        publish(OutputOptions(out), "new")
    assert (out / "file").read_text() == "old"
    publish(OutputOptions(out, overwrite=True), "new")
    assert (out / "file").read_text() == "new"
    assert list(out.parent.iterdir()) == [out]


def test_the_old_output_stays_until_the_new_one_is_whole(out: Path) -> None:
    publish(OutputOptions(out), "old")
    interrupt(OutputOptions(out, overwrite=True), KeyboardInterrupt())
    assert (out / "file").read_text() == "old"


def test_foreign_directories_are_never_touched(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="did not write"):
            check_output(OutputOptions(out, overwrite=overwrite))
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way(out: Path) -> None:
    out.write_text("")
    with pytest.raises(OutputExistsError, match="is a file"):
        check_output(OutputOptions(out, overwrite=True))


def test_an_empty_directory_may_be_filled(out: Path) -> None:
    out.mkdir()
    publish(OutputOptions(out))
    assert (out / "file").exists()


def test_missing_parent(out: Path) -> None:
    with pytest.raises(MissingPathError, match="does not exist"):
        check_output(OutputOptions(out / "deeper" / "out"))


def test_a_swap_killed_between_its_renames_is_undone(out: Path) -> None:
    publish(OutputOptions(out), "old")
    out.rename(out.parent / ".out.spine-previous")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_output(OutputOptions(out))
    assert (out / "file").read_text() == "old"


def test_a_swap_killed_after_its_renames_is_finished(out: Path) -> None:
    publish(OutputOptions(out), "new")
    (out.parent / ".out.spine-previous").mkdir()
    check_output(OutputOptions(out, overwrite=True))
    assert (out / "file").read_text() == "new"
    assert list(out.parent.iterdir()) == [out]


def test_a_kill_while_publishing_leaves_the_old_or_the_new(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at every step of `publish`, the output is whole at each moment, or restored by the next command."""
    publish(OutputOptions(out), "old")
    options = OutputOptions(out, overwrite=True, resume=True)
    steps = 0
    real_rename, real_rmtree = Path.rename, directory_module.shutil.rmtree

    class Killed(BaseException):
        pass

    for allowed in range(30):
        left = [allowed]

        def step(left: list[int] = left) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", lambda self, to, step=step: (step(), real_rename(self, to))[1])
            patched.setattr(
                directory_module.shutil, "rmtree", lambda *a, step=step, **k: (step(), real_rmtree(*a, **k))[1]
            )
            try:
                publish(options, "new")
                break
            except Killed:
                steps += 1
                if out.exists():
                    assert (out / "file").read_text() in ("old", "new")
                    read_manifest(out)
    assert steps >= 3
    assert (out / "file").read_text() == "new"
    assert list(out.parent.iterdir()) == [out]


def test_what_a_kill_behind_the_publishing_left_is_cleared(out: Path) -> None:
    publish(OutputOptions(out))
    for beside in (work_of(out) / "state", out.parent / ".out.spine-previous"):
        beside.mkdir(parents=True)
    (work_of(out) / "run.json").write_text('{"fingerprint": ""}')
    written = read_manifest(out)
    same = fingerprint_of(written.command, written.parameters, written.seed, written.inputs)
    assert finished_run(OutputOptions(out, resume=True), same) == written
    assert list(out.parent.iterdir()) == [out]


def test_a_second_process_is_kept_out(out: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from spinecli.artifacts.directory import *\n"
        "from spinecli.errors import UnfinishedRunError\n"
        "try:\n"
        "    with work_directory(OutputOptions(Path(sys.argv[1]), resume=True), {'command': 'prune'}): print('in')\n"
        "except UnfinishedRunError as error: print(error)\n"
    )

    def other() -> str:
        return subprocess.run([sys.executable, "-c", script, out], capture_output=True, text=True, check=True).stdout

    with pytest.raises(KeyboardInterrupt), work_directory(OutputOptions(out), FINGERPRINT):  # noqa: PT012
        assert "Another process is writing" in other()
        raise KeyboardInterrupt
    assert other() == "in\n"


def test_overwrite_does_not_drop_work_that_is_going_on(out: Path) -> None:
    with work_directory(OutputOptions(out), FINGERPRINT) as work:
        with pytest.raises(UnfinishedRunError, match="Another process"):
            publish(OutputOptions(out, overwrite=True))
        assert work.files.is_dir()


def test_a_full_disk_is_told_as_such_and_can_be_resumed(out: Path) -> None:
    with pytest.raises(NoSpaceError, match="is full"), work_directory(OutputOptions(out), FINGERPRINT):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert work_of(out).exists()


def test_a_full_disk_is_recognised_behind_safetensors(out: Path) -> None:
    from safetensors import SafetensorError

    told = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(NoSpaceError, match="is full"), work_directory(OutputOptions(out), FINGERPRINT):
        raise told
    with pytest.raises(SafetensorError), work_directory(OutputOptions(out, resume=True), FINGERPRINT):
        raise SafetensorError("Error while serializing: something else")


def test_other_system_errors_pass_through(out: Path) -> None:
    with pytest.raises(PermissionError), work_directory(OutputOptions(out), FINGERPRINT):
        raise PermissionError("no")


def test_space_is_asked_for_beforehand(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(NoSpaceError, match="GB"):
        require_space(tmp_path, 1 << 60)


def test_finished_run_is_recognised_by_its_fingerprint(out: Path) -> None:
    publish(OutputOptions(out))
    written = read_manifest(out)
    same = fingerprint_of(written.command, written.parameters, written.seed, written.inputs)
    assert finished_run(OutputOptions(out, resume=True), same) == written
    assert finished_run(OutputOptions(out), same) is None
    assert finished_run(OutputOptions(out, resume=True), {**same, "seed": 1}) is None
    assert finished_run(OutputOptions(out.parent / "other", resume=True), same) is None


def test_marker_holds_the_fingerprint_and_not_the_options(out: Path) -> None:
    interrupt(OutputOptions(out), KeyboardInterrupt())
    assert list(json.loads((work_of(out) / "run.json").read_text())) == ["fingerprint"]


def test_paths_of_the_work_directory(out: Path) -> None:
    work = WorkDirectory(out, work_of(out))
    assert (work.files.parent, work.state.parent) == (work.root, work.root)


def test_a_file_that_a_kill_tore_is_no_part_of_the_output(out: Path) -> None:
    """safetensors writes beside the file that it is to become."""

    class Killed(BaseException):
        pass

    with pytest.raises(Killed), work_directory(OutputOptions(out), FINGERPRINT) as work:  # noqa: PT012
        (work.files / "below").mkdir()
        (work.files / "below" / ".tmpAbCdEf").write_text("half")
        raise Killed
    publish(OutputOptions(out, resume=True))
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"file", MANIFEST_NAME}
