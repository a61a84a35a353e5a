"""What server and device write around the messages of a run: who is there, which job is whose, what came of it.

hello    ▶ a device's process has connected        welcome  ◀ what the run asks of every device
ready    ▶ its model and data are loaded            job      ◀ one message of the run
unready  ▶ they cannot be loaded, and why           leave    ◀ the run is over, or has no place for it
alive    ▶ every few seconds
accepted ▶ it has a whole job
answer   ▶ what came of the job
failed   ▶ nothing came of the job, and why

An envelope is the length of a JSON header (4 bytes, big-endian), the header, and the bytes that it carries. Nothing in
it is executed, and a header with anything unexpected is refused.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, ValidationError

from spinecli.artifacts.record import FiniteRecord
from spinecli.errors import MessageError
from spinecli.federation.bounds import MOST_EXAMPLES, ClassName, Examples, Seconds
from spinecli.federation.simulation.conditions import Conditions

HELLO, READY, UNREADY, ALIVE, ACCEPTED, ANSWER, FAILED = (
    "hello",
    "ready",
    "unready",
    "alive",
    "accepted",
    "answer",
    "failed",
)
WELCOME, JOB, LEAVE = "welcome", "job", "leave"

RUN_IS_OVER = "the run is over"
"""Why devices leave when all is well."""

_LENGTH_BYTES = 4
_LONGEST_HEADER = 1 << 20
_LONGEST_EXPLANATION = 1000

_Number = Annotated[int, Field(ge=0, le=MOST_EXAMPLES)]
_Explanation = Annotated[str, Field(max_length=_LONGEST_EXPLANATION)]


class Empty(FiniteRecord):
    """Nothing beside the carried bytes."""


class Welcome(FiniteRecord):
    """What the run asks of every device is carried."""

    server: str = Field(max_length=100)
    """The server's process; job numbers begin anew with each."""


class Hello(FiniteRecord):
    """A device's process has connected, perhaps again."""

    version: str = Field(max_length=100)
    """Of this package."""
    job: int | None = None
    """The newest job that it has received."""


class Ready(FiniteRecord):
    """What a device says of itself; see `Node`."""

    device_class: ClassName
    memory_bytes: _Number
    examples: Examples
    label_counts: tuple[_Number, ...] = Field(default=(), max_length=1_000_000)


class ServerNotice(FiniteRecord):
    """Why a device cannot take part, or why it shall leave."""

    explanation: _Explanation


class JobHeader(FiniteRecord):
    """One request of a run."""

    job: int
    run: str
    """A new run begins with devices that remember nothing."""
    kind: str
    conditions: Conditions | None = None
    """Under which a virtual clock counts the work; None: the seconds that pass are counted."""


class Accepted(FiniteRecord):
    """A job has arrived whole."""

    job: int


class Answer(FiniteRecord):
    """What came of a job; the answer itself is carried."""

    job: int
    seconds: Seconds
    """Of work: on the virtual clock if there is one, else from the job's arrival on."""


class Failed(FiniteRecord):
    """Nothing came of a job."""

    job: int
    explanation: _Explanation


Header = TypeVar("Header", bound=BaseModel)


def encode_envelope(header: BaseModel, carried: bytes = b"") -> bytes:
    """An envelope as bytes."""
    text = header.model_dump_json().encode()
    return len(text).to_bytes(_LENGTH_BYTES, "big") + text + carried


def decode_envelope(kind: type[Header], envelope: bytes) -> tuple[Header, bytes]:
    """The header and the carried bytes of an envelope; MessageError if it is malformed."""
    length = int.from_bytes(envelope[:_LENGTH_BYTES], "big")
    start = _LENGTH_BYTES + length
    if len(envelope) < _LENGTH_BYTES or length > _LONGEST_HEADER or len(envelope) < start:
        raise MessageError(f"A {kind.__name__} envelope is truncated.")
    try:
        return kind.model_validate_json(envelope[_LENGTH_BYTES:start]), envelope[start:]
    except ValidationError as error:
        raise MessageError(f"A {kind.__name__} envelope is malformed: {error.errors()[0]['msg']}.") from error


def explained(text: str) -> str:
    """A text as an explanation: one line, and not too long."""
    return " ".join(text.split())[:_LONGEST_EXPLANATION]
