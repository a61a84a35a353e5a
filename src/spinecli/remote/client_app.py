"""What a SuperNode of Flower starts for every message: it loads model and data, does one job, and is gone.

Whatever a device must keep from one message to the next is on its disk: what it is and what the run asks of it, its
data, and what it remembers.
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from spinecli.federation.engines.envelope import (
    ANSWER,
    FAILED,
    Answer,
    Failed,
    JobHeader,
    decode_envelope,
    encode_envelope,
)
from spinecli.federation.engines.flower.payload import ENROLLED, Enrolled, packed, unpacked
from spinecli.remote.client_runtime import ClientRuntime, explanation_of, open_runtime
from spinecli.remote.supernode import SETTING, SuperNodeConfig


def enrol(message: Message, context: Context) -> Message:
    """Say who this device is, and whether it can take part."""
    supernode_config = _supernode_config(context)
    name, token = supernode_config.client.device, supernode_config.token
    try:
        enrolled = Enrolled(device=name, token=token, ready=_runtime(supernode_config).ready())
    except Exception as error:
        enrolled = Enrolled(device=name, token=token, trouble=explanation_of(error))
    return Message(packed(ENROLLED, encode_envelope(enrolled)), reply_to=message)


def work(message: Message, context: Context) -> Message:
    """Do one job. Whatever it raises is an answer, too: the device keeps its place in the run."""
    _, envelope = unpacked(message.content)
    header, blob = decode_envelope(JobHeader, envelope)
    try:
        runtime = _runtime(_supernode_config(context))
        answer = runtime.work(header.run, header.kind, header.conditions, blob)
    except Exception as error:
        failed = Failed(job=header.job, explanation=explanation_of(error))
        return Message(packed(FAILED, encode_envelope(failed)), reply_to=message)
    seconds = _seconds_of_this_process() if header.conditions is None else runtime.meter.total
    return Message(packed(ANSWER, encode_envelope(Answer(job=header.job, seconds=seconds), answer)), reply_to=message)


def _supernode_config(context: Context) -> SuperNodeConfig:
    return SuperNodeConfig.model_validate_json(Path(str(context.node_config[SETTING])).read_text(encoding="utf-8"))


def _runtime(supernode_config: SuperNodeConfig) -> ClientRuntime:
    return open_runtime(supernode_config.run_config, supernode_config.client)


def _seconds_of_this_process() -> float:
    """How long this process has been there: its start and the loading of the model are part of a job's work."""
    began: float = psutil.Process().create_time()
    return max(0.0, time.time() - began)


app = ClientApp()
app.query()(enrol)
app.train()(work)
