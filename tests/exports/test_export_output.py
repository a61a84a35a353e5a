from __future__ import annotations

import errno
from pathlib import Path

import pytest

from spinecli.errors import MissingPathError, NoSpaceError, OutputExistsError, UnfinishedRunError
from spinecli.exports.output import check_directory_output, check_file_output, whole_directory, whole_file


def fail_in_file(out: Path, error: type[BaseException]) -> None:
    with whole_file(out) as part:
        part.write_bytes(b"half")
        raise error


def fail_in_directory(out: Path) -> None:
    with whole_directory(out) as folder:
        (folder / "config.json").write_text("2")
        raise ValueError("stop")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    with whole_file(out) as part:
        part.write_bytes(b"half")
        assert not out.exists()
    assert out.read_bytes() == b"half"
    assert names(tmp_path) == ["x.gguf"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_or_not_at_all(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "x.gguf"
    out.write_bytes(b"old")
    with pytest.raises(error):
        fail_in_file(out, error)
    assert out.read_bytes() == b"old"
    assert names(tmp_path) == ["x.gguf"]


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".x.gguf.spine-part").write_bytes(b"a much longer beginning")
    (tmp_path / ".d.spine-part").mkdir()
    (tmp_path / ".d.spine-part" / "model.safetensors").write_bytes(b"left")
    with whole_file(tmp_path / "x.gguf") as part:
        part.write_bytes(b"new")
    with whole_directory(tmp_path / "d") as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "x.gguf").read_bytes() == b"new"
    assert names(tmp_path) == ["d", "x.gguf"]
    assert names(tmp_path / "d") == ["config.json"]


def test_two_processes_do_not_write_the_same_output(tmp_path: Path) -> None:
    with whole_file(tmp_path / "x") as part:
        part.write_bytes(b"first")
        with pytest.raises(UnfinishedRunError, match="Another process"), whole_file(tmp_path / "x"):
            pass
        assert part.read_bytes() == b"first"
    with whole_directory(tmp_path / "d") as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(UnfinishedRunError, match="Another process"), whole_directory(tmp_path / "d"):
            pass
    assert names(tmp_path / "d") == ["config.json"]


def test_a_directory_replaces_another_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "d"
    with whole_directory(out) as folder:
        (folder / "config.json").write_text("1")
        (folder / "merges.txt").write_text("1")
    with pytest.raises(ValueError, match="stop"):
        fail_in_directory(out)
    assert (out / "config.json").read_text() == "1"
    with whole_directory(out) as folder:
        (folder / "config.json").write_text("3")
    assert names(out) == ["config.json"]
    assert names(tmp_path) == ["d"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    previous = tmp_path / ".d.spine-previous"
    previous.mkdir()
    (previous / "config.json").write_text("old")
    with pytest.raises(ValueError, match="stop"), whole_directory(tmp_path / "d"):
        raise ValueError("stop")
    assert (tmp_path / "d" / "config.json").read_text() == "old"


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match="full"), whole_file(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_places_that_are_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    taken, folder = tmp_path / "x.gguf", tmp_path / "folder"
    taken.write_bytes(b"")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for check in (check_file_output, check_directory_output):
        with pytest.raises(MissingPathError, match="does not exist"):
            check(tmp_path / "nowhere" / "x", False, checkpoint)
        with pytest.raises(OutputExistsError, match="inside each other"):
            check(checkpoint / "x", True, checkpoint)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_file_output(taken, False, checkpoint)
    with pytest.raises(OutputExistsError, match="is a directory"):
        check_file_output(folder, True, checkpoint)
    with pytest.raises(OutputExistsError, match="is a file"):
        check_directory_output(taken, True, checkpoint)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_directory_output(folder, False, checkpoint)
    with pytest.raises(OutputExistsError, match="inside each other"):
        check_directory_output(checkpoint, True, checkpoint)
    check_file_output(taken, True, checkpoint)
    check_directory_output(folder, True, checkpoint)


def test_a_directory_with_anything_else_in_it_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text("{}")
    (tmp_path / "d" / "thesis.tex").write_text("")
    with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
        check_directory_output(tmp_path / "d", True, tmp_path / "checkpoint")
