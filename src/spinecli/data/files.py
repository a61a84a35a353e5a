"""Files as text: unpacked, in the encoding that they begin with, and told in one sentence where they are not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
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
_ARCHIVE = "unpack it and name the file in it that is meant"
_DOCUMENT = "save its text as .txt, or its rows as .csv"
_ARRAYS = "save its rows as .jsonl, .csv or .parquet"
_WEIGHTS = "name a file of text"
# (from this byte on, these bytes, what such a file is, what to do); a form comes before one that it is a case of
_NO_TEXT = (
    (0, b"\x1f\x8b", "a gzip file", "rename it to end in .gz"),
    (0, b"\xfd7zXZ", "an xz file", "rename it to end in .xz"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", "rename it to end in .zst"),
    (30, b"[Content_Types].xml", "a document of an office program", _DOCUMENT),
    (30, b"mimetypeapplication/", "a document of an office program", _DOCUMENT),
    (0, b"PK\x03\x04", "a zip archive", _ARCHIVE),
    (0, b"PK\x05\x06", "an empty zip archive", "name another file"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _ARCHIVE),
    (0, b"Rar!\x1a\x07", "a rar archive", _ARCHIVE),
    (257, b"ustar\0", "a tar archive", _ARCHIVE),
    (257, b"ustar  \0", "a tar archive", _ARCHIVE),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of an office program", _DOCUMENT),
    (0, b"\x93NUMPY", "a NumPy array", _ARRAYS),
    (0, b"ARROW1\0\0", "an Arrow file", _ARRAYS),
    (0, b"\x89HDF\r\n", "an HDF5 file", _ARRAYS),
    (0, b"SQLite format 3\0", "an SQLite database", _ARRAYS),
    *((0, bytes((0x80, version)), "a Python pickle", _ARRAYS) for version in range(2, 6)),
    *((0, b"GGUF" + bytes((version, 0, 0, 0)), "a model in GGUF", _WEIGHTS) for version in range(1, 4)),
    # behind the length of the header
    (4, b'\0\0\0\0{"', "weights in safetensors", _WEIGHTS),
)
# a text may begin like these, so they are looked for only in what has been found to be none
_PERHAPS_TEXT = (
    (0, b"BZh", "a bzip2 file", "rename it to end in .bz2"),
    (0, b"PAR1", "a parquet file", "rename it to end in .parquet"),
    (0, b"%PDF-", "a PDF document", "save its text as .txt"),
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


def refuse_binary(path: Path) -> None:
    """Tell what a file is that by its first bytes is no text.

    Raises: MissingPathError, DataError.
    """
    with open_bytes(path) as content:
        _refuse(path, _head(content), (*_NO_TEXT, *_PERHAPS_TEXT))


def _refuse(path: Path, head: bytes, forms: Iterable[tuple[int, bytes, str, str]]) -> None:
    for start, magic, form, way_out in forms:
        if head.startswith(magic, start):
            raise DataError(f"{path} is {form} and not text; {way_out}.")


def _head(content: IO[bytes]) -> bytes:
    return cast("io.BufferedReader", content).peek(_HEAD)[:_HEAD]


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
    head = _head(content)
    _refuse(path, head, _NO_TEXT)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if head.count(0) > len(head) // 4:
        _refuse(path, head, _PERHAPS_TEXT)
        raise DataError(f"{path} looks like UTF-16 without a byte order mark; save it as UTF-8.")
    return "utf-8"


def _undecodable(path: Path, error: UnicodeError) -> DataError:
    with open_bytes(path) as content:
        _refuse(path, _head(content), _PERHAPS_TEXT)
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
