"""What a message of Flower carries: one envelope as an array of bytes, under the name of its topic.

Flower's arrays know no bfloat16, so tensors travel as the blob that every engine sends. Nothing of what comes is
decoded by Flower beyond its own records, which are protocol buffers.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict
from pydantic import Field

from spinecli.errors import MessageError
from spinecli.federation.engines.envelope import Empty, Ready

ENROLLED = "enrolled"
_RECORD = "spine"
_KIND = "envelope"
_LARGEST = 1 << 30
_MIB = 1 << 20


class Enrolled(Empty):
    """Who a SuperNode is, and whether it can take part."""

    device: str = Field(max_length=100)
    token: str = Field(max_length=100)
    """That the server has given to this device alone; anybody on this machine can connect a SuperNode."""
    ready: Ready | None = None
    trouble: str = Field(default="", max_length=1000)


def packed(topic: str, envelope: bytes) -> RecordDict:
    """An envelope as what a message of Flower carries."""
    array = Array(dtype="uint8", shape=(len(envelope),), stype=_KIND, data=envelope)
    return RecordDict({_RECORD: ArrayRecord({topic: array})})


def unpacked(content: RecordDict) -> tuple[str, bytes]:
    """Topic and envelope of what somebody has sent. Raises MessageError if it is anything else."""
    record = content.get(_RECORD)
    if len(content) != 1 or not isinstance(record, ArrayRecord) or len(record) != 1:
        raise MessageError("A Flower message does not contain exactly one envelope.")
    ((topic, array),) = record.items()
    if (array.dtype, array.stype, tuple(array.shape)) != ("uint8", _KIND, (len(array.data),)):
        raise MessageError("A Flower message does not contain bytes.")
    if len(array.data) > _LARGEST:
        raise MessageError(f"A Flower message is larger than {_LARGEST // _MIB} MiB.")
    return topic, bytes(array.data)
