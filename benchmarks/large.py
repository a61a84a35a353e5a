"""Memory and time at real size: a random-weight checkpoint with LLaMA-2-7B's shape, pruned and tuned.

    python benchmarks/large.py [--work DIR] [--dtype bfloat16] [--blocks 4] [--widths adaptive]
    python benchmarks/large.py [--work DIR] [--dtype bfloat16] --prune-method comp [--metric m1] [--tune lsq]

Makes the checkpoint once (13.5 GB in bfloat16, sharded; fewer `--blocks` make it smaller) and runs
`spine prune --sparsity 0.2` and, after a method that does not re-fit, `spine tune` on it as processes of their own,
with 16 x 128 calibration tokens. Prints each one's peak resident memory, as the system counted it for the process, and
where its seconds went. Skips when the disk has no room.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig

from spinecli.checkpoints.family import Task
from spinecli.checkpoints.skeleton import build_skeleton, stored_shapes
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.tensors import ComputedTensor
from spinecli.checkpoints.writer import write_checkpoint

BYTES_PER_BLOCK = 1_250_000_000
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights of a freshly initialised model: ones for norms, normal with a deviation of 0.02 otherwise."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(hash_of(name))
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def hash_of(name: str) -> int:
    """A seed from a name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def make_checkpoint(directory: Path, **shape: int) -> None:
    """Write a random checkpoint with the built-in model's tokenizer; `shape` differs from LLaMA-2-7B's."""
    config = LlamaConfig(**{**SHAPE, **shape})
    raw = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    groups = [
        {name: ComputedTensor(shape, torch.bfloat16, partial(random_tensor, name, shape))}
        for name, shape in stored_shapes(build_skeleton(config, Task.causal_lm)).items()
    ]
    partial_directory = directory.with_suffix(".part")
    partial_directory.mkdir(exist_ok=True)
    write_checkpoint(partial_directory, raw, groups, resolve_checkpoint("builtin:tiny"))
    partial_directory.rename(directory)


def measured(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a spine command."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "spinecli", *arguments, "--quiet"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"spine {arguments[0]} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def report(step: str, seconds: float, peak: int, directory: Path) -> None:
    """Print one line of the table."""
    split = json.loads((directory / "spine.json").read_text())["measured"]["seconds"]
    cells = " | ".join(f"{split.get(phase, 0):.0f}" for phase in ("reading", "computing", "writing", "verifying"))
    print(f"| {step} | {peak / 1e9:.2f} GB | {seconds:.0f} | {cells} |", flush=True)


def main() -> None:
    """Run both steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--block-share", default="auto")
    parser.add_argument("--prune-method", default="spine")
    parser.add_argument("--widths", default="uniform")
    parser.add_argument("--metric", default="m4", help="of --prune-method comp")
    parser.add_argument("--tune", default="auto", help="of a method that does not re-fit")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="spine-large-"))
    needed = (options.blocks + 2) * BYTES_PER_BLOCK
    if shutil.disk_usage(work).free < needed:
        print(f"skipped: {work} has less than {needed / 1e9:.0f} GB free")
        return
    dense, pruned, tuned = (work / f"{name}-{options.blocks}" for name in ("dense", "pruned", "tuned"))
    if not dense.is_dir():
        make_checkpoint(dense, num_hidden_layers=options.blocks)
    print("| step | peak memory | seconds | reading | computing | writing | verifying |\n|---|---|---|---|---|---|---|")
    common = ["--overwrite", "--dtype", options.dtype]
    rows = ["--calibration", "builtin:tiny-calibration", "--calibration-rows", "16", "--calibration-length", "128"]
    prune = ["prune", str(dense), "--sparsity", "0.2", "--out", str(pruned), *rows, *common]
    prune += ["--method", options.prune_method, "--block-share", options.block_share]
    refits = options.prune_method == "spine"
    prune += ["--widths", options.widths] if refits else ["--metric", options.metric]
    report("prune", *measured(prune), pruned)
    if not refits:
        report("tune", *measured(["tune", str(pruned), "--out", str(tuned), "--method", options.tune, *common]), tuned)


if __name__ == "__main__":
    main()
