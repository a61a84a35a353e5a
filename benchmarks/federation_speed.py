"""What the simulator costs: rounds a minute, memory, and its overhead over bare training steps.

    python benchmarks/federation_speed.py

80 devices, 10 a round, on builtin:tiny. The bare steps are a plain loop over the very batches of a round, with one
adapter and one optimiser: forward, backward, clipping, AdamW. They are those of the uncut model; a strategy that cuts
(`--sparsity 0.3`) computes less than they do, and may end below zero.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from spinecli.artifacts.seeding import torch_generator
from spinecli.artifacts.stopwatch import peak_memory
from spinecli.config import make_config
from spinecli.data.batches import Batch, batches
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.federation.client.training import loss_of
from spinecli.federation.config import FederateConfig
from spinecli.federation.history import History, Measurement, RoundRecord
from spinecli.federation.loop import Loop
from spinecli.federation.request import FederatedRequest, open_request
from spinecli.federation.rounds import draw_cohort
from spinecli.federation.run import Federation, set_up
from spinecli.lora.factors import fresh_factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--data", default="builtin:tiny-topics")
    parser.add_argument("--strategies", default="fedit,legend,fedspine,fedspine-model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.0, help="where pruners end; 0: they only measure")
    asked = parser.parse_args()
    print("| strategy | rounds a minute | a round | its steps alone | overhead | peak memory |")
    print("|---|---|---|---|---|---|")
    for strategy in asked.strategies.split(","):
        config = make_config(
            FederateConfig,
            asked.model,
            {
                "data": asked.data,
                "strategy": strategy,
                "max_length": asked.max_length,
                "rounds": asked.rounds,
                "local_steps": asked.local_steps,
                "batch_size": asked.batch_size,
                "sparsity": asked.sparsity,
                "prune_interval": asked.local_steps,
            },
        )
        with quiet_libraries():
            request = open_request(config)
            federation = set_up(request)
        simulated, bare = measured(request, federation)
        whole, steps = statistics.median(simulated), statistics.median(bare)
        overhead = statistics.median(a / b for a, b in zip(simulated, bare, strict=True)) - 1
        memory = peak_memory() or 0
        figures = f"{60 / whole:.1f} | {whole:.2f} s | {steps:.2f} s | {overhead:.1%} | {memory / 1e6:.0f} MB"
        print(f"| {strategy} | {figures} |", flush=True)


def measured(request: FederatedRequest, federation: Federation) -> tuple[list[float], list[float]]:
    """Seconds of every round, and of its steps alone, taken by turns so that both see the same machine."""
    simulated: list[float] = []
    bare: list[float] = []

    def unmeasured(model: object) -> Measurement:
        return Measurement(loss=0.0, accuracy=0.0)

    started = time.perf_counter()

    def listen(record: RoundRecord) -> None:
        nonlocal started
        simulated.append(time.perf_counter() - started)
        bare.append(bare_steps(request, federation, record.round))
        started = time.perf_counter()

    loop = Loop(request.config, federation.training, unmeasured, lambda _: None)
    loop.run(History(None), listen)
    return simulated, bare


def bare_steps(request: FederatedRequest, federation: Federation, number: int) -> float:
    """Seconds of the round's local steps without fleet, messages, pruning or aggregation, at the uniform rank."""
    base, config, setting = federation.base, request.config, federation.setting
    lora, train = config.lora, config.train
    parts = dict(zip((device.name for device in request.fleet.devices), request.parts, strict=True))
    prepared: list[list[Batch]] = []
    for device in draw_cohort(setting.nodes, train.cohort, config.seed, number):
        generator = torch_generator(config.seed, "batches", device, number)
        prepared.append(list(batches(request.train, parts[device], train.batch_size, train.local_steps, generator)))
    generator = torch.Generator().manual_seed(0)
    with base.lent(setting.head):
        base.attach(
            {
                name: fresh_factors(d_out, d_in, lora.rank, generator)
                for name, (d_out, d_in) in base.target_shapes().items()
            },
            lora.scale,
        )
        parameters = base.trainable()
        optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
        started = time.perf_counter()
        for steps in prepared:
            for batch in steps:
                loss_of(base, batch).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
