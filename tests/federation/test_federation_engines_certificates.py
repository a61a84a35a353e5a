from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from spinecli.errors import MissingPathError, OptionError, UnsafeFileError
from spinecli.federation.engines.nvflare.certificates import certify, read_identity
from spinecli.federation.engines.nvflare.names import require_device_name


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    certify(tmp_path, ["one"], ["localhost"])
    keys = sorted(tmp_path.rglob("key.pem"))
    assert len(keys) == 3
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    key = tmp_path / "one" / "key.pem"
    key.chmod(0o640)
    with pytest.raises(UnsafeFileError, match="chmod 600"):
        read_identity(tmp_path / "one")
    key.unlink()
    with pytest.raises(MissingPathError, match=r"key\.pem"):
        read_identity(tmp_path / "one")


def test_certificates_are_made_once(tmp_path: Path) -> None:
    assert certify(tmp_path, ["one"], ["localhost"]) == ["server", "one"]
    before = (tmp_path / "one" / "certificate.pem").read_bytes()
    assert certify(tmp_path, ["one", "two"], []) == ["two"]
    assert (tmp_path / "one" / "certificate.pem").read_bytes() == before
    with pytest.raises(OptionError, match="--host"):
        certify(tmp_path / "other", ["one"], [])


@pytest.mark.parametrize("name", ["", "server", "Server", "authority", "a.b", "a b", "../x", "-x", "x" * 61])
def test_names_that_no_device_can_have_are_refused(name: str) -> None:
    with pytest.raises(OptionError):
        require_device_name(name)
