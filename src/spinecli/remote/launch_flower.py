"""A whole fleet on this machine, with Flower between server and devices.

The server is this process, and every device a SuperNode beside it. What devices keep lies in the run's state directory,
as with NVFlare; what Flower itself writes lies there as well and goes when the devices do.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spinecli.federation.engine import Engine
from spinecli.federation.engines.flower.engine import FlowerEngine
from spinecli.federation.engines.flower.link import Link, log_to
from spinecli.federation.engines.loopback import LOOPBACK
from spinecli.federation.request import FederatedRequest
from spinecli.federation.simulation.virtual_clock import VirtualClock
from spinecli.remote.client_dir import prepare_client_dir
from spinecli.remote.run_config import run_config_of
from spinecli.remote.running import LOG_NAME, Running, require_all, start, stop
from spinecli.remote.supernode import SETTING, LaunchedSuperNode, SuperNodeConfig

_CLIENT_APP = "spinecli.remote.client_app:app"
_OWN_FILES = "flower"
_TASK_POLL_SECONDS = "0.2"
"""Between two looks of a device for a message to start a process for; Flower's own second would be part of every round.
"""


@contextmanager
def on_this_machine(request: FederatedRequest, state: Path, note: Callable[[str], None]) -> Iterator[Engine]:
    """An engine with every device of the fleet as a SuperNode here; all of them end when the context does.

    Args:
        state: where what devices keep is found again by a resumed run.
        note: told in a line what runs where.

    Raises: FederationError if a device cannot take part.
    """
    place = state / "devices"
    place.mkdir(mode=0o700, exist_ok=True)
    log_to(place / f"server-{LOG_NAME}")
    tokens = {spec.name: secrets.token_hex(16) for spec in request.fleet.devices}
    clock = VirtualClock(request.fleet, request.config.seed) if request.config.clock == "fleet" else None
    running: dict[str, Running] = {}
    with ExitStack() as stack:
        link = Link(_CLIENT_APP)
        stack.callback(link.close)
        for name in tokens:
            stack.callback(shutil.rmtree, place / name / _OWN_FILES, ignore_errors=True)
        stack.callback(lambda: stop(list(running.values())))
        for number, (name, token) in enumerate(tokens.items()):
            running[name] = _start(request, number, place / name, token, link.port)
        note(
            f"server and {len(tokens)} devices listen and connect on {LOOPBACK} alone, "
            f"Flower's SuperLink on port {link.port}"
        )
        engine = FlowerEngine(tokens, link, lambda name: running[name].ended(), clock)
        engine.wait_for_all(lambda status: require_all(list(running.values()), status))
        yield engine


def _start(request: FederatedRequest, number: int, place: Path, token: str, superlink: int) -> Running:
    client = prepare_client_dir(request, number, place)
    own = place.resolve() / _OWN_FILES
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(mode=0o700)
    supernode_config = SuperNodeConfig(client=client, run_config=run_config_of(request), token=token)
    (own / "supernode.json").write_text(supernode_config.model_dump_json(), encoding="utf-8")
    (own / "settings.toml").write_text(f"{SETTING} = {json.dumps(str(own / 'supernode.json'))}\n", encoding="utf-8")
    (own / "secret").write_text(secrets.token_hex(32), encoding="utf-8")
    environment = {
        **os.environ,
        "FLWR_HOME": str(own),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _TASK_POLL_SECONDS,
        "TMPDIR": str(own),
        # where Flower looks for its own commands
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
    }
    launched = LaunchedSuperNode(superlink=superlink, settings=own / "settings.toml", secret=own / "secret")
    return start(client.device, "spinecli.remote.supernode", launched, place, environment)
