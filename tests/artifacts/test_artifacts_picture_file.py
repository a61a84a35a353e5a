from __future__ import annotations

from pathlib import Path

import pytest

from spinecli.artifacts.picture_file import check_picture, save_figure
from spinecli.errors import MissingPackageError, MissingPathError, OptionError, OutputExistsError, UserError


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    (tmp_path / "made" / "inner").mkdir(parents=True)
    (tmp_path / "made" / "spine.json").write_text("{}")
    return tmp_path / "made" / "inner"


@pytest.mark.parametrize("name", ["cut.png", "cut.svg", "cut.PDF"])
def test_a_new_file_beside_the_artifact_is_fine(tmp_path: Path, artifact: Path, name: str) -> None:
    check_picture(tmp_path / name, artifact)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("cut.jpg", OptionError, "writes .png, .svg, .pdf files, not cut.jpg"),
        ("cut", OptionError, "change its ending"),
        (".", OutputExistsError, "is a directory"),
        ("nowhere/cut.png", MissingPathError, "nowhere does not exist"),
        ("taken.png", OutputExistsError, "add --overwrite"),
        ("made/cut.png", OutputExistsError, "which holds what spine wrote"),
        ("made/inner/cut.png", OutputExistsError, "which holds what spine wrote"),
    ],
)
def test_other_places_are_refused(tmp_path: Path, artifact: Path, name: str, kind: type[UserError], words: str) -> None:
    (tmp_path / "taken.png").write_text("a picture")
    with pytest.raises(kind, match=words):
        check_picture(tmp_path / name, artifact)
    assert (tmp_path / "taken.png").read_text() == "a picture"


def test_a_file_may_be_replaced_if_the_user_says_so(tmp_path: Path, artifact: Path) -> None:
    (tmp_path / "taken.png").write_text("a picture")
    check_picture(tmp_path / "taken.png", artifact, overwrite=True)


def test_without_matplotlib_one_sentence_says_how_to_get_it(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinecli.artifacts.picture_file.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install 'spinecli\\[plots\\]'"):
        check_picture(tmp_path / "cut.png", artifact)


class Broken:
    def savefig(self, path: Path, **_: object) -> None:
        path.write_text("half a pic")
        raise OSError("no more room")


def test_a_picture_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no more room"):
        save_figure(Broken(), tmp_path / "cut.png")
    assert list(tmp_path.iterdir()) == []
