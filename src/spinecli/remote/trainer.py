"""A device's training process: `python -m spinecli.remote.trainer SOCKET`, started by its site.

It loads what its own config and the run's say, tells that it is ready, and answers one job after another. When the
site's end of the socket closes, it ends at once, whatever it is doing.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from multiprocessing.connection import Connection

from spinecli.federation.engines.envelope import (
    ANSWER,
    FAILED,
    READY,
    UNREADY,
    Answer,
    Empty,
    Failed,
    JobHeader,
    ServerNotice,
    decode_envelope,
    encode_envelope,
)
from spinecli.federation.engines.nvflare.child import frame, unframed
from spinecli.remote.client_config import ClientConfig
from spinecli.remote.client_runtime import ClientRuntime, explanation_of, open_runtime
from spinecli.remote.run_config import RunConfig

_Frames = queue.SimpleQueue[tuple[str, bytes]]


def main(number: int) -> None:
    """Work for the site at the other end of the socket with this number."""
    connection = Connection(number)
    frames: _Frames = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, frames), daemon=True).start()
    try:
        client, run_config = _carried(frames), _carried(frames)
        runtime = open_runtime(RunConfig.model_validate_json(run_config), ClientConfig.model_validate_json(client))
    except Exception as error:
        connection.send_bytes(frame(UNREADY, encode_envelope(ServerNotice(explanation=explanation_of(error)))))
        sys.exit(1)
    connection.send_bytes(frame(READY, encode_envelope(runtime.ready())))
    while True:
        connection.send_bytes(frame(*_answer(runtime, frames.get()[1])))


def _answer(runtime: ClientRuntime, envelope: bytes) -> tuple[str, bytes]:
    """What came of a job. Whatever it raises is an answer, too: the device keeps its place in the run."""
    header, blob = decode_envelope(JobHeader, envelope)
    try:
        answer = runtime.work(header.run, header.kind, header.conditions, blob)
    except Exception as error:
        return FAILED, encode_envelope(Failed(job=header.job, explanation=explanation_of(error)))
    return ANSWER, encode_envelope(Answer(job=header.job, seconds=runtime.meter.total), answer)


def _carried(frames: _Frames) -> bytes:
    return decode_envelope(Empty, frames.get()[1])[1]


def _listen(connection: Connection, frames: _Frames) -> None:
    try:
        while True:
            frames.put(unframed(connection.recv_bytes()))
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
