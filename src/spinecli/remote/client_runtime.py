"""Where a device's training process works: the model it has loaded, its data, its memory, and its clock."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from spinecli.artifacts.whole_file import whole_file
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.tokenizer import tokenizer_of
from spinecli.data.config import ExamplesConfig
from spinecli.data.encoding import Encoded, encode
from spinecli.data.examples import load_dataset
from spinecli.errors import FederationError, SpineError
from spinecli.federation.client.base_model import BaseModel
from spinecli.federation.client.device import Device, DeviceMemory, Meter
from spinecli.federation.client.handle import handle
from spinecli.federation.client.part import load_part
from spinecli.federation.engines.envelope import Ready, explained
from spinecli.federation.messages import Message
from spinecli.federation.planning.workload import Head, head_of
from spinecli.federation.simulation.conditions import Conditions
from spinecli.federation.simulation.virtual_clock import VirtualMeter
from spinecli.federation.split.cost import SplitCosts
from spinecli.federation.split.device import SplitDevice
from spinecli.federation.split.device import handle as handle_split
from spinecli.federation.split.model import SplitModel
from spinecli.lora.cost import TrainingCosts
from spinecli.remote.client_config import ClientConfig
from spinecli.remote.run_config import RunConfig, SplitCharter


class StopwatchMeter:
    """Counts the seconds since the last charge under the phase that the next one names."""

    def __init__(self) -> None:
        self._last = self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def begin(self) -> None:
        """A new job."""
        self._last = self._began = time.perf_counter()
        self._seconds = {}

    def charge(self, phase: str, flops: float) -> None:
        """The time since the last charge was spent on `phase`."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def seconds(self, phase: str) -> float:
        """Seconds charged to `phase` in this job."""
        return self._seconds.get(phase, 0.0)

    @property
    def total(self) -> float:
        """Seconds since the job began."""
        return time.perf_counter() - self._began


_MEMORY_NAME = "memory.safetensors"


class JobMeter:
    """Counts a job's time on the clock that the job asks for."""

    def __init__(self) -> None:
        self._stopwatch = StopwatchMeter()
        self._virtual = VirtualMeter()
        self._current: StopwatchMeter | VirtualMeter = self._stopwatch

    def begin(self, conditions: Conditions | None) -> None:
        """A new job, under conditions of a simulated fleet or in the time that passes."""
        if conditions is None:
            self._stopwatch.begin()
            self._current = self._stopwatch
        else:
            self._virtual.begin(conditions)
            self._current = self._virtual

    def charge(self, phase: str, flops: float) -> None:
        """The work since the last charge belonged to `phase` and took `flops` operations."""
        self._current.charge(phase, flops)

    def seconds(self, phase: str) -> float:
        """Seconds charged to `phase` in this job."""
        return self._current.seconds(phase)

    @property
    def total(self) -> float:
        """Seconds of this job."""
        return self._current.total


@dataclass(eq=False)
class ClientRuntime:
    """A device that is ready to work."""

    client: ClientConfig
    data: Encoded
    labels: int
    memory: DeviceMemory
    meter: JobMeter
    handle: Callable[[str, Message], Message]
    _run: str = ""

    @property
    def examples(self) -> int:
        """Size of the data set."""
        return len(self.data.offsets) - 1

    @property
    def label_counts(self) -> tuple[int, ...]:
        """How many examples it has of each of the run's labels; empty for language modelling."""
        if not self.labels:
            return ()
        counts = self.data.labels.bincount(minlength=self.labels)
        return tuple(counts.tolist())

    def ready(self) -> Ready:
        """What it says of itself when it enrols."""
        return Ready(
            device_class=self.client.device_class,
            memory_bytes=self.client.memory_bytes,
            examples=self.examples,
            label_counts=self.label_counts,
        )

    def work(self, run: str, kind: str, conditions: Conditions | None, blob: bytes) -> bytes:
        """Do one job; what the device remembers is on disk before this returns.

        Args:
            run: a new run begins with empty memory.

        Raises: MessageError.
        """
        if run != self._run:
            self._recall(run)
        self.meter.begin(conditions)
        answer = self.handle(kind, Message.unpack(blob)).pack()
        self._keep()
        return answer

    def _recall(self, run: str) -> None:
        path = self.client.memory / _MEMORY_NAME
        self._run, self.memory.tensors = run, {}
        if path.is_file():
            kept = Message.unpack(path.read_bytes())
            if kept.header.get("run") == run:
                self.memory.tensors = dict(kept.tensors)

    def _keep(self) -> None:
        if not self.memory.tensors:
            return
        self.client.memory.mkdir(parents=True, exist_ok=True)
        path = self.client.memory / _MEMORY_NAME
        with whole_file(path) as part:
            part.write_bytes(Message({"run": self._run}, self.memory.tensors).pack())


def open_runtime(run_config: RunConfig, client: ClientConfig) -> ClientRuntime:
    """Load what the run's config asks for, and take as many threads as the client allows.

    Raises: FederationError if this device's checkpoint or data do not fit the run's config, and what loading can raise.
    """
    if client.threads is not None:
        torch.set_num_threads(client.threads)
    path = resolve_checkpoint(client.model)
    if describe_source(client.model, path).digest != run_config.checkpoint:
        raise FederationError(f"{client.model} is not the checkpoint of this run; give every device the server's.")
    checkpoint = Checkpoint.open(path)
    data = _data(run_config, client, checkpoint)
    if data.task != run_config.task:
        raise FederationError(f"This device has data for {data.task}, and the run trains {run_config.task}.")
    labels, meter, memory = len(run_config.labels), JobMeter(), DeviceMemory()
    loaded = _Loaded(run_config, client, checkpoint, head_of(checkpoint, labels or None), data, memory, meter)
    handler = _federated(loaded) if run_config.split is None else _split(loaded, run_config.split)
    return ClientRuntime(client, data, labels, memory, meter, handler)


def explanation_of(error: Exception) -> str:
    """What the server hears of an error; one that nobody foresaw goes to this process' log as a whole."""
    if isinstance(error, SpineError):
        return explained(str(error))
    traceback.print_exception(error)
    return explained(f"{type(error).__name__}: {error}")


def _data(run_config: RunConfig, client: ClientConfig, checkpoint: Checkpoint) -> Encoded:
    """The device's examples; labels by the run's names, so that every device numbers them alike."""
    if client.part is not None:
        return load_part(client.part)
    columns = client.columns if run_config.labels else client.columns.model_copy(update={"label_column": None})
    examples = ExamplesConfig(**columns.model_dump(), task=run_config.task)
    dataset = load_dataset(client.data or "", examples, run_config.labels or None)
    vocabulary = int(checkpoint.config.vocab_size)
    return encode(dataset, tokenizer_of(checkpoint), run_config.max_length, vocabulary=vocabulary)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """What every kind of device is made of."""

    run_config: RunConfig
    client: ClientConfig
    checkpoint: Checkpoint
    head: Head
    data: Encoded
    memory: DeviceMemory
    meter: Meter

    @property
    def compute(self) -> ComputeOptions:
        """Where and in which precision to compute."""
        return self.run_config.compute(self.client.compute_device)

    @property
    def indices(self) -> range:
        """All examples are the device's own."""
        return range(len(self.data.offsets) - 1)


def _federated(loaded: _Loaded) -> Callable[[str, Message], Message]:
    run_config, checkpoint, head = loaded.run_config, loaded.checkpoint, loaded.head
    labels, pad_id = len(run_config.labels), loaded.data.pad_id
    base = BaseModel(
        checkpoint, run_config.task, labels, run_config.lora.targets, pad_id, run_config.seed, loaded.compute
    )
    costs = TrainingCosts.of(checkpoint, base.targets, head.weights, head.per_token, head_trained=head.trained)
    device = Device(loaded.client.device, base, costs, loaded.data, loaded.indices, loaded.memory, loaded.meter)
    return lambda kind, message: handle(kind, message, device)


def _split(loaded: _Loaded, split: SplitCharter) -> Callable[[str, Message], Message]:
    run_config, checkpoint, config = loaded.run_config, loaded.checkpoint, split.config
    labels, pad_id = len(run_config.labels), loaded.data.pad_id
    lora, seed = run_config.lora, run_config.seed
    model = SplitModel(checkpoint, run_config.task, labels, split.cut, config, lora, pad_id, seed, loaded.compute)
    costs = SplitCosts.of(checkpoint, split.cut, config, lora, loaded.head)
    device = SplitDevice(loaded.client.device, model, costs, loaded.data, loaded.indices, loaded.memory, loaded.meter)
    return lambda kind, message: handle_split(kind, message, device)
