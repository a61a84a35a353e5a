"""The server's end of Flower: a SuperLink in this process that serves the Fleet API, on loopback, and nothing else.

Flower's own command also serves its Control API, by which anybody who reaches the port can have SuperNodes run code of
his. Here there is none, nor a Runtime API: messages are put into the SuperLink's state and taken from it directly.
SuperNodes sign what they say with keys of their own; who they are, the engine asks them.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from flwr.app import Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_api
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from spinecli.errors import FederationError
from spinecli.federation.engines.envelope import explained
from spinecli.federation.engines.flower.payload import packed, unpacked
from spinecli.federation.engines.loopback import LOOPBACK

_APP = """
[project]
name = "spine"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "spine"

[tool.flwr.app.components]
clientapp = "{client_app}"
serverapp = "{client_app}"
"""
"""Flower asks for a ServerApp, too; nobody starts it."""
_PUBLISHER_AND_NAME, _VERSION = "spine/spine", "1.0.0"
_MESSAGE_SECONDS = 30 * 24 * 3600.0
_HEARTBEAT_SECONDS = 10.0
_START_SECONDS = 30.0


@dataclass(frozen=True)
class Received:
    """What has come in answer to a message."""

    topic: str = ""
    envelope: bytes = b""
    failure: str = ""
    """Why there is no envelope, and none will come."""


class Link:
    """A SuperLink with one run.

    Args:
        client_app: what SuperNodes start for a message, as `module:attribute` of what is installed on them.

    Raises: FederationError if it does not start to listen.
    """

    def __init__(self, client_app: str) -> None:
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        self._state = factory.state()
        self._run = self._begin_run(client_app)
        self._arriving: dict[str, str] = {}
        self._closed = threading.Event()
        self._server = uvicorn.Server(
            uvicorn.Config(_fleet_app(factory), host=LOOPBACK, port=0, log_config=None, access_log=False)
        )
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._server.run, self._stay_alive)]
        for thread in self._threads:
            thread.start()
        limit = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if time.monotonic() > limit or not self._threads[0].is_alive():
                raise FederationError(f"Flower's SuperLink cannot listen on {LOOPBACK}.")
            time.sleep(0.01)
        self.port = int(self._server.servers[0].sockets[0].getsockname()[1])

    def _begin_run(self, client_app: str) -> int:
        """A running run, whose ServerApp is this process."""
        content, _ = build_fab_from_files({"pyproject.toml": _APP.format(client_app=client_app).encode()})
        digest = hashlib.sha256(content).hexdigest()
        self._state.store_fab(Fab(digest, content, {}))
        run = self._state.create_run(
            *(_PUBLISHER_AND_NAME, _VERSION, digest, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID),
            TaskType.SERVER_APP,
        )
        (facts,) = self._state.get_run_info(run_ids=[run])
        self._task = facts.primary_task_id
        self._state.claim_task(self._task)
        self._state.activate_task(self._task)
        return int(run)

    def _stay_alive(self) -> None:
        while not self._closed.wait(_HEARTBEAT_SECONDS):
            self._state.acknowledge_task_heartbeat(self._task)

    def nodes(self) -> set[int]:
        """The SuperNodes that are online."""
        return set(self._state.get_nodes(self._run))

    def send(self, node: int, kind: str, topic: str, envelope: bytes) -> str | None:
        """Put a message where a SuperNode looks for it; returns the message's id, None if the node has left."""
        metadata = Metadata(
            run_id=self._run,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=_MESSAGE_SECONDS,
            message_type=kind,
        )
        message = make_message(metadata, packed(topic, envelope))
        with no_object_id_recompute():
            number = str(message.object_id)
            metadata.__dict__["_message_id"] = number
            tree, objects = get_object_tree(message), get_all_nested_objects(message)
            session = self._state.start_session(self._run)
            stored, missing = self._state.store_message_and_object_tree(
                remove_content_from_message(message), tree, session
            )
            for each in missing:
                self._state.store_object(self._run, session, each, objects[each].deflate())
        return number if stored else None

    def fetched(self, number: str) -> bool:
        """Whether the SuperNode has a message whole."""
        try:
            self._state.object_store.get_object_tree(number)
        except NoObjectInStoreError:
            return True
        return False

    def receive(self, numbers: Collection[str]) -> dict[str, Received]:
        """The answers to these messages that have come whole, by the messages' ids; each is given once."""
        for reply in self._state.get_message_res(set(numbers) - self._arriving.keys(), self._run):
            self._arriving[reply.metadata.reply_to_message_id] = reply.metadata.message_id
        found = {number: self._read(self._arriving[number]) for number in numbers if number in self._arriving}
        whole = {number: received for number, received in found.items() if received is not None}
        for number in whole:
            self.forget(number)
        return whole

    def _read(self, answer: str) -> Received | None:
        """An answer; None if parts of it are still on their way."""
        try:
            parts = [part.object_id for part in iterate_object_tree(self._state.object_store.get_object_tree(answer))]
        except NoObjectInStoreError:
            return Received(failure="its answer did not come whole")
        contents = {part: self._state.get_object(self._run, part) for part in parts}
        if b"" in contents.values():
            return None
        try:
            message = inflate_object_from_contents(answer, contents)
            if message.has_error():
                return Received(failure=explained(f"Flower says: {message.error.reason}"))
            return Received(*unpacked(message.content))
        except Exception as error:  # Flower does not say what reading somebody's bytes can raise
            return Received(failure=explained(f"its answer cannot be read: {error}"))

    def forget(self, number: str) -> None:
        """Keep nothing of a message and its answer; one that comes later is refused."""
        for each in (number, self._arriving.pop(number, number)):
            self._state.object_store.delete(each)
        self._state.delete_messages({number})

    def close(self) -> None:
        """Stop to listen."""
        self._closed.set()
        self._server.should_exit = True
        for thread in self._threads:
            thread.join(_START_SECONDS)


def _fleet_app(factory: LinkStateFactory) -> FastAPI:
    app = FastAPI(
        openapi_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ],
    )
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = False
    app.include_router(fleet_api)
    return app


def log_to(path: Path) -> None:
    """Write the log of Flower and of its web server to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("flwr", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
