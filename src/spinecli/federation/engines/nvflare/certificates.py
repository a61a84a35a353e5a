"""Certificates by which server and devices know each other, made with NVFlare's own tools.

authority/    certificate and key of the authority: whoever has this key decides who takes part
server/       what the server needs: authority.pem, certificate.pem, key.pem
<device>/     the same for each device; this directory, and nothing else, goes to the device

Keys are written for their owner alone. A device's certificate serves to connect only; it cannot pass for a server's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from nvflare.lighter.utils import Identity as Subject
from nvflare.lighter.utils import generate_cert, generate_keys, serialize_cert, serialize_pri_key

from spinecli.errors import MissingPathError, OptionError, UnsafeFileError
from spinecli.federation.engines.nvflare.names import SERVER

_AUTHORITY = "authority"
_AUTHORITY_FILE, _CERTIFICATE_FILE, _KEY_FILE = "authority.pem", "certificate.pem", "key.pem"
_ISSUER = "spine"
_OWNER_ONLY = 0o600
DEFAULT_DAYS = 365


@dataclass(frozen=True)
class Identity:
    """What one side shows the other."""

    authority: Path
    """Certificate of the authority that the other side must have its own from."""
    certificate: Path
    key: Path


def read_identity(directory: Path) -> Identity:
    """The identity in a directory.

    Raises: MissingPathError, UnsafeFileError if others than the owner may read the key.
    """
    identity = Identity(directory / _AUTHORITY_FILE, directory / _CERTIFICATE_FILE, directory / _KEY_FILE)
    for path in (identity.authority, identity.certificate, identity.key):
        if not path.is_file():
            raise MissingPathError(f"{path} does not exist; name a directory that spine fed-certify has written.")
    if stat.S_IMODE(identity.key.stat().st_mode) & 0o077:
        raise UnsafeFileError(f"{identity.key} can be read by others; run chmod 600 {identity.key}.")
    return identity


def name_in(identity: Identity) -> str:
    """Whom a certificate is issued to."""
    certificate = x509.load_pem_x509_certificate(identity.certificate.read_bytes())
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(name.value)


def certify(directory: Path, devices: Sequence[str], hosts: Sequence[str], days: int = DEFAULT_DAYS) -> list[str]:
    """Make the certificates that a directory lacks: of the authority, of the server at `hosts`, of the devices.

    The server's is made anew whenever `hosts` are named. Returns the names that got one.

    Raises: OptionError if there is no server yet and no host is named.
    """
    place = directory / _AUTHORITY
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (place / _KEY_FILE).is_file():
        key, public = generate_keys()
        issuer = Subject(_ISSUER)
        _write(place, key, generate_cert(issuer, issuer, key, public, days, ca=True), None)
    signing = serialization.load_pem_private_key((place / _KEY_FILE).read_bytes(), None)
    authority = (place / _CERTIFICATE_FILE).read_bytes()
    made = []
    if hosts:
        _issue(directory, SERVER, signing, authority, days, hosts)
        made.append(SERVER)
    elif not (directory / SERVER).is_dir():
        raise OptionError(
            "Give the address at which devices reach the server with --host; its certificate is issued for it."
        )
    for device in devices:
        if not (directory / device).is_dir():
            _issue(directory, device, signing, authority, days, ())
            made.append(device)
    return made


def _issue(directory: Path, name: str, signing: Any, authority: bytes, days: int, hosts: Sequence[str]) -> None:
    key, public = generate_keys()
    usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    certificate = generate_cert(
        Subject(name),
        Subject(_ISSUER),
        signing,
        public,
        days,
        server_default_host=hosts[0] if hosts else None,
        server_additional_hosts=list(hosts[1:]),
        extra_extensions=[(x509.ExtendedKeyUsage([usage]), True)],
    )
    _write(directory / name, key, certificate, authority)


def _write(place: Path, key: Any, certificate: Any, authority: bytes | None) -> None:
    place.mkdir(mode=0o700, exist_ok=True)
    (place / _CERTIFICATE_FILE).write_bytes(serialize_cert(certificate))
    if authority is not None:
        (place / _AUTHORITY_FILE).write_bytes(authority)
    path = place / _KEY_FILE
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY), "wb") as handle:
        handle.write(serialize_pri_key(key))
