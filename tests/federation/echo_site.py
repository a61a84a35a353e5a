"""A device whose training process does not train: `python echo_site.py DEVICE PORT IDENTITY HOST`.

Its training process does what the kind of a job says: echo, sleep SECONDS, fail, garbage, cut, die. In place of DEVICE,
with a good certificate of slow-00: `rogue` sends what no device may send, `flood` sends without end, `crowd` comes in
many times at once.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any


def site(device: str, port: int, directory: str, host: str) -> None:
    from spinecli.federation.engines.nvflare.certificates import read_identity
    from spinecli.federation.engines.nvflare.connection import Address, log_to
    from spinecli.federation.engines.nvflare.site import Site

    log_to(None)
    identity = None if directory == "none" else read_identity(Path(directory))
    training = (sys.executable, __file__, "training")
    running = Site(device, Address(host, port), identity, training, device.encode())

    def stop_at_the_end_of_input() -> None:
        sys.stdin.read()
        running.stop()

    threading.Thread(target=stop_at_the_end_of_input, daemon=True).start()
    sys.stdout.write(running.run() + "\n")
    sys.stdout.flush()


def rogue(port: int, directory: str) -> None:
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
    from nvflare.fuel.f3.message import Message

    from spinecli.federation.engines.nvflare.certificates import read_identity
    from spinecli.federation.engines.nvflare.connection import Address, Connection, log_to

    log_to(None)
    connected = threading.Event()
    address, identity = Address("127.0.0.1", port), read_identity(Path(directory))
    line = Connection("slow-00.rogue", address, identity, lambda *_: None, lambda _: connected.set(), lambda _: None)
    line.open()
    connected.wait(60)
    cell = line._cell
    cell.fire_and_forget("spine", "job", "fast-00.12345678", Message({}, b"for another device"))
    cell.fire_and_forget("spine", "hello", "server", Message({}, {"structured": "payload"}))
    cell.add_outgoing_request_filter(
        "*", "*", lambda message: message.set_header(MessageHeaderKey.ORIGIN, "fast-00.12345678")
    )
    cell.fire_and_forget("spine", "hello", "server", Message({}, b"in the name of another device"))
    time.sleep(2)
    line.close()


def flood(port: int, directory: str) -> None:
    from nvflare.fuel.f3.message import Message

    (line,) = _connected(port, directory, 1)
    for _ in range(150):
        line._cell.fire_and_forget("spine", "answer", "server", Message({}, bytes(4 << 20)))
    sys.stdout.write("sent\n")
    sys.stdout.flush()
    time.sleep(600)


def crowd(port: int, directory: str) -> None:
    _connected(port, directory, 8)
    time.sleep(600)


def _connected(port: int, directory: str, count: int) -> list[Any]:
    """So many connections of one device, the first of them complete."""
    from spinecli.federation.engines.nvflare.certificates import read_identity
    from spinecli.federation.engines.nvflare.connection import Address, Connection, log_to

    log_to(None)
    connected = threading.Event()
    address, identity = Address("127.0.0.1", port), read_identity(Path(directory))
    lines = []
    for number in range(count):
        name = f"slow-00.{number:08d}"
        lines.append(Connection(name, address, identity, lambda *_: None, lambda _: connected.set(), lambda _: None))
        lines[-1].open()
    connected.wait(60)
    return lines


def training(number: int) -> None:
    import os
    import queue
    import signal
    from multiprocessing.connection import Connection

    from spinecli.federation.engines import envelope
    from spinecli.federation.engines.nvflare.child import frame, unframed

    connection = Connection(number)
    frames: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                frames.put(unframed(connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    frames.get()
    run_config = envelope.decode_envelope(envelope.Empty, frames.get()[1])[1]
    if run_config == b"impossible":
        told = envelope.ServerNotice(explanation="this cannot be loaded")
        connection.send_bytes(frame(envelope.UNREADY, envelope.encode_envelope(told)))
        sys.exit(1)
    ready = envelope.Ready(device_class="echo", memory_bytes=1000, examples=3, label_counts=(1, 2))
    connection.send_bytes(frame(envelope.READY, envelope.encode_envelope(ready)))
    while True:
        header, blob = envelope.decode_envelope(envelope.JobHeader, frames.get()[1])
        do, _, rest = header.kind.partition(" ")
        if do == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if do == "sleep":
            time.sleep(float(rest))
        if do == "fail":
            failed = envelope.Failed(job=header.job, explanation="no such thing")
            connection.send_bytes(frame(envelope.FAILED, envelope.encode_envelope(failed)))
            continue
        answer = b"garbage" if do == "garbage" else blob[:-3] if do == "cut" else blob
        seconds = 0.0 if header.conditions is None else header.conditions.compute_seconds(1e6)
        sealed = envelope.encode_envelope(envelope.Answer(job=header.job, seconds=seconds), answer)
        connection.send_bytes(frame(envelope.ANSWER, sealed))


if __name__ == "__main__":
    if sys.argv[1] == "training":
        training(int(sys.argv[2]))
    elif sys.argv[1] in ("rogue", "flood", "crowd"):
        {"rogue": rogue, "flood": flood, "crowd": crowd}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
    else:
        site(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
