from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spinecli.artifacts.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Measured,
    Source,
    damaged_files,
    expect_kind,
    lineage_behind,
    read_manifest,
    record_files,
    sha256_file,
    sha256_value,
)
from spinecli.errors import DamagedArtifactError, ForeignArtifactError, MissingPathError, UserError

SOURCE = Source(reference="/models/dense", files={"model.safetensors": FileRecord(sha256="ab", bytes=2)})


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "kind": "pruned-checkpoint",
        "command": "prune",
        "parameters": {"sparsity": 0.3},
        "seed": 0,
        "inputs": {"model": SOURCE},
        "outputs": {},
        "summary": "thirty per cent",
        "report": {"achieved": 0.3},
        "measured": Measured(started="now", seconds={"total": 1.0}, peak_memory_bytes=1, versions={"torch": "1"}),
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"weights")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "scores").write_bytes(b"scores")
    manifest(outputs=record_files(tmp_path)).sealed().write(tmp_path)
    return tmp_path


def test_sums_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_value({"b": 1, "a": [2]}) == sha256_value({"a": [2], "b": 1})
    assert sha256_value({"a": 1}) != sha256_value({"a": 2})


def test_files_longer_than_the_buffer_are_summed_whole(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * (4 << 20) + b"1")
    (tmp_path / "two").write_bytes(b"x" * (4 << 20) + b"2")
    assert sha256_file(tmp_path / "one") != sha256_file(tmp_path / "two")


def test_digest_ignores_what_was_measured_and_where_inputs_lie() -> None:
    later = Measured(started="later", seconds={}, peak_memory_bytes=None, versions={})
    moved = SOURCE.model_copy(update={"reference": "/elsewhere"})
    assert manifest(measured=later).computed_digest() == manifest().computed_digest()
    assert manifest(inputs={"model": moved}).computed_digest() == manifest().computed_digest()


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"sparsity": 0.4}},
        {"seed": 1},
        {"kind": "tuned-checkpoint"},
        {"command": "tune"},
        {"report": {"achieved": 0.4}},
        {"outputs": {"file": FileRecord(sha256="cd", bytes=1)}},
        {"inputs": {"model": Source(reference="x", files={"model.safetensors": FileRecord(sha256="cd", bytes=2)})}},
    ],
)
def test_digest_covers_what_the_step_is_and_does(change: dict[str, Any]) -> None:
    assert manifest(**change).computed_digest() != manifest().computed_digest()


def test_source_digest_depends_on_names_and_sums() -> None:
    renamed = Source(reference="", files={"other": FileRecord(sha256="ab", bytes=2)})
    assert renamed.digest != SOURCE.digest


def test_manifest_comes_back_as_it_was_written(artifact: Path) -> None:
    written = manifest(outputs=record_files(artifact)).sealed()
    assert read_manifest(artifact) == written
    assert set(written.outputs) == {"weights", "tables/scores"}
    assert written.digest == written.computed_digest()


def test_an_untouched_artifact_has_no_damaged_files(artifact: Path) -> None:
    assert damaged_files(artifact, read_manifest(artifact)) == {}


def test_damage_is_found_and_named(artifact: Path) -> None:
    listed = read_manifest(artifact)
    (artifact / "weights").unlink()
    (artifact / "tables" / "scores").write_bytes(b"Scores")
    (artifact / "tables" / "extra").write_bytes(b"")
    assert damaged_files(artifact, listed) == {
        "weights": "missing",
        "tables/scores": "changed",
        "tables/extra": "not listed",
    }


def test_a_changed_manifest_is_damage(artifact: Path) -> None:
    raw = json.loads((artifact / MANIFEST_NAME).read_text())
    raw["parameters"]["sparsity"] = 0.9
    (artifact / MANIFEST_NAME).write_text(json.dumps(raw))
    assert damaged_files(artifact, read_manifest(artifact)) == {MANIFEST_NAME: "changed"}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{", DamagedArtifactError),
        ("[]", ForeignArtifactError),
        ('{"spine_format": 99}', ForeignArtifactError),
        ('{"spine_format": 1}', DamagedArtifactError),
        (b"\xff\xfe", DamagedArtifactError),
    ],
)
def test_unreadable_manifests_name_the_file(tmp_path: Path, content: str | bytes, wanted: type[UserError]) -> None:
    file = tmp_path / MANIFEST_NAME
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(wanted, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_no_manifest_and_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ForeignArtifactError, match="no spine command wrote it"):
        read_manifest(tmp_path)
    with pytest.raises(MissingPathError):
        read_manifest(tmp_path / "absent")


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_reaches_outside_is_refused(tmp_path: Path, name: str) -> None:
    manifest(outputs={name: FileRecord(sha256="ab", bytes=1)}).write(tmp_path)
    with pytest.raises(DamagedArtifactError, match="outside"):
        read_manifest(tmp_path)


def test_kind_is_checked_with_the_way_out(artifact: Path) -> None:
    assert expect_kind(artifact, ("pruned-checkpoint",), "").kind == "pruned-checkpoint"
    with pytest.raises(ForeignArtifactError, match="not a evaluation; run spine eval"):
        expect_kind(artifact, ("evaluation",), "run spine eval")


def test_lineage_of_a_dense_checkpoint_is_that_checkpoint(tmp_path: Path) -> None:
    [step] = lineage_behind(tmp_path, SOURCE)
    assert (step.kind, step.digest, step.reference) == ("dense-checkpoint", SOURCE.digest, SOURCE.reference)


def test_lineage_grows_by_the_input(artifact: Path) -> None:
    source = Source(reference="out", files={"weights": record_files(artifact)["weights"]})
    steps = lineage_behind(artifact, source)
    assert [step.reference for step in steps] == ["out"]
    assert steps[-1].digest == read_manifest(artifact).digest


def test_an_input_that_was_changed_after_spine_wrote_it_is_refused(artifact: Path) -> None:
    changed = Source(reference="out", files={"weights": FileRecord(sha256="other", bytes=7)})
    with pytest.raises(DamagedArtifactError, match="weights"):
        lineage_behind(artifact, changed)
