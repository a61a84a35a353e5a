"""A device's training process, as its site sees it: started, asked, and perhaps dead.

Training runs in a process of its own, so that its death, out of memory or by a signal, is an answer like any other.
Both talk over a pair of sockets, in frames of a topic and an envelope. When the site dies the pair breaks, and the
training process ends at once.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from spinecli.errors import MessageError

_STOP_SECONDS = 5.0


def frame(topic: str, envelope: bytes) -> bytes:
    """A topic and an envelope as bytes."""
    name = topic.encode()
    return len(name).to_bytes(1, "big") + name + envelope


def unframed(blob: bytes) -> tuple[str, bytes]:
    """The topic and the envelope of a frame; MessageError if it has none."""
    if not blob or len(blob) < 1 + blob[0]:
        raise MessageError("A frame is truncated.")
    return blob[1 : 1 + blob[0]].decode(errors="replace"), blob[1 + blob[0] :]


class Child:
    """A running training process.

    Args:
        command: starts it; the number of its socket is added.
        heard: called for every frame with this object, the topic and the envelope, in a thread.
        died: called with a sentence on how it ended, in the same thread.
    """

    def __init__(
        self,
        command: Sequence[str],
        heard: Callable[[Child, str, bytes], None],
        died: Callable[[Child, str], None],
    ) -> None:
        own, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [*command, str(number)], pass_fds=(number,), stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._connection = Connection(own.detach())
        self._heard, self._died = heard, died
        self._listener = threading.Thread(target=self._listen, name="training", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, topic: str, envelope: bytes) -> None:
        """Hand it a frame; a process that has died says so by itself."""
        try:
            self._connection.send_bytes(frame(topic, envelope))
        except (BrokenPipeError, ConnectionResetError):
            return

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait(_STOP_SECONDS)

    def _listen(self) -> None:
        try:
            while True:
                self._heard(self, *unframed(self._connection.recv_bytes()))
        except (EOFError, ConnectionResetError):
            self._died(self, _ending(self._process.wait()))


def _ending(code: int) -> str:
    if code >= 0:
        return f"its training process ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"its training process was killed by {name}"
