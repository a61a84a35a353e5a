"""Files as text: unpacked, in the encoding that they begin with, and told in one sentence where they are not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO, cast

from spinecli.errors import DataError, MissingPathError, reason_of

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

# UTF-32 first: its mark begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = (
    (b"\x1f\x8b", "a gzip file", ".gz"),
    (b"BZh", "a bzip2 file", ".bz2"),
    (b"\xfd7zXZ", "an xz file", ".xz"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", ".zst"),
    (b"PAR1", "a parquet file", ".parquet"),
)
_HEAD = 4096
_BLOCK = 1 << 20
# what the unpackers raise on files that are damaged or packed by another program
_UNPACKING = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: `.csv` of `Train.CSV.gz`, empty if it has none."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked content of a file.

    Raises: MissingPathError, DataError if the file cannot be opened, or is no such archive as its name says.
    """
    try:
        with path.open("rb") as packed, _unpacked(packed, path) as content:
            yield content
    except FileNotFoundError as error:
        raise MissingPathError(f"{path} does not exist; name a file or directory of examples.") from error
    except _UNPACKING as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:
            raise _damaged(path, error) from error
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The text of a file, which is UTF-8, or what its byte order mark says; the mark is no part of it.

    Args:
        newline: as `open` takes it.

    Raises: MissingPathError, DataError, the latter also while the text is read.
    """
    try:
        with open_bytes(path) as content:
            yield io.TextIOWrapper(content, encoding=_encoding(path, content), newline=newline)
    except UnicodeError as error:
        raise _undecodable(path, error) from error


def read_text(path: Path) -> str:
    """The whole text of a file, with every end of a line as a newline. Raises: as `open_text`."""
    with open_text(path) as text:
        return text.read()


def _unpacked(packed: IO[bytes], path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        content: object = gzip.GzipFile(fileobj=packed)
    elif suffix == ".bz2":
        content = bz2.BZ2File(packed)
    elif suffix == ".xz":
        content = lzma.LZMAFile(packed)  # noqa: SIM115  the caller closes it
    elif suffix == ".zst":
        import pyarrow

        content = pyarrow.CompressedInputStream(packed, "zstd")
    else:
        content = packed
    return cast("IO[bytes]", io.BufferedReader(cast("io.RawIOBase", content), _BLOCK))


def _encoding(path: Path, content: IO[bytes]) -> str:
    head = cast("io.BufferedReader", content).peek(_HEAD)[:_HEAD]
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if head.count(0) > len(head) // 4:
        raise DataError(f"{path} looks like UTF-16 without a byte order mark; save it as UTF-8.")
    return "utf-8"


def _undecodable(path: Path, error: UnicodeError) -> DataError:
    with open_bytes(path) as content:
        head = cast("io.BufferedReader", content).peek(_HEAD)
        for magic, form, suffix in _MAGIC:
            if head.startswith(magic):
                return DataError(f"{path} is {form} and not text; rename it to end in {suffix}.")
        encoding = _encoding(path, content)
        # the decoder counts from the block that it was in
        place = _first_undecodable(content) if encoding == "utf-8" else None
    if place is None:
        return DataError(f"{path} is not the text that its byte order mark promises ({error}); save it as UTF-8.")
    return DataError(
        f"{path} is not UTF-8 text at byte {place}, as files in Windows-1252 and Latin-1 are not; convert it first."
    )


def _first_undecodable(content: IO[bytes]) -> int | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = waiting = 0
    while block := content.read(_BLOCK):
        try:
            decoder.decode(block)
        except UnicodeDecodeError as error:
            return read - waiting + error.start
        read += len(block)
        waiting = len(decoder.getstate()[0])
    return read - waiting


def _damaged(path: Path, error: Exception) -> DataError:
    reason = reason_of(error)
    return DataError(f"{path} cannot be unpacked ({reason}); fetch it again or pack it anew.")
