"""What a step of healing costs beside the same LoRA step in plain PyTorch, and the memory that a larger model needs.

    python benchmarks/healing_cost.py MODEL [--steps 4] [--rows 4] [--length 512] [--dtype bfloat16] [--skip-memory]

Step: MODEL with LoRA of rank 16 on every projection and the loss on the text, the same random rows; by hand it is a
module around each Linear, transformers' own loss, AdamW and clipping, with the norms trained, too. The two take turns;
the figure is the smallest CPU seconds of each. Memory: random weights of a Llama with 1.1 billion parameters (d 2048,
22 blocks, 32 heads with 4 KV heads, FFN 5632, vocabulary 32,000) in bfloat16, cut by a block, a few steps of each kind
in a process of its own. One thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from large import make_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.data.rows import TokenRows
from spinecli.healing.config import DistillConfig, Loss
from spinecli.healing.distillation import Distillation, Lesson
from spinecli.healing.student import Student

RANK = 16
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


class ByHand(nn.Module):
    """A Linear and its factors."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.rand(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return self.base(inputs) + nn.functional.linear(nn.functional.linear(inputs, self.down), self.up)


class PlainStep:
    """The step as a person writes it in an afternoon."""

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().requires_grad_(False)
        for block in self.model.model.layers:
            for part in (block.self_attn, block.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(part, name, ByHand(child))
        for module in self.model.modules():
            if "Norm" in type(module).__name__:
                module.weight.data = module.weight.data.float()
                module.weight.requires_grad_(True)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=0.0, fused=True)

    def __call__(self, tokens: Tensor) -> None:
        """Train on (rows, length)."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def step_times(arguments: argparse.Namespace) -> None:
    """Print the smallest CPU seconds of a step, ours and by hand."""
    checkpoint, dtype = Checkpoint.open(arguments.model), getattr(torch, arguments.dtype)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(int(checkpoint.config.vocab_size), (arguments.rows + 2, arguments.length), generator=generator)
    config = DistillConfig(loss=Loss.lm, rank=RANK, batch_size=arguments.rows)
    student = Student(checkpoint, config, ComputeOptions("cpu", dtype), seed=0)
    lesson = Lesson(TokenRows(rows, ("random",), torch.zeros(len(rows), dtype=torch.int64)), 2, None)
    ours = Distillation(student, lesson, config, arguments.steps * rows.numel(), seed=0)
    plain = PlainStep(arguments.model, dtype)
    taken: dict[str, list[float]] = {"spine": [], "by hand": []}
    for step in range(1, arguments.steps + 1):
        for name, task in (
            ("spine", lambda step=step: ours._step(step, torch.arange(arguments.rows))),
            ("by hand", lambda: plain(rows[: arguments.rows])),
        ):
            start = time.process_time()
            task()
            taken[name].append(time.process_time() - start)
    best = {name: min(times) for name, times in taken.items()}
    print(
        f"a step of {arguments.rows} x {arguments.length} tokens, {arguments.dtype}: spine {best['spine']:.2f} CPU s, "
        f"by hand {best['by hand']:.2f}, ratio {best['spine'] / best['by hand']:.2f}"
    )


def memory(kinds: dict[str, list[str]]) -> None:
    """Print the peak memory of healing a random model of 1.1 billion parameters."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_checkpoint(work / "dense", **SHAPE)
        spine = [sys.executable, "-m", "spinecli"]
        text = ["builtin:tiny-calibration", "--calibration-rows", "8", "--calibration-length", "64"]
        cut = ["--method", "shortgpt", "--sparsity", "0.04", "--dtype", "bfloat16"]
        subprocess.run(
            [*spine, "prune", work / "dense", *cut, "--calibration", *text, "--out", work / "cut", "--quiet"],
            check=True,
        )
        for kind, options in kinds.items():
            budget = ["--text", "builtin:tiny-calibration", "--tokens", "8192", "--dtype", "bfloat16", *options]
            heal = [*spine, "heal", str(work / "cut"), *budget, "--json"]
            answers = []
            for end in (["--dry-run"], ["--out", str(work / "out"), "--overwrite"]):
                answers.append(json.loads(subprocess.run([*heal, *end], check=True, capture_output=True).stdout))
            foreseen, done = answers
            measured = done["measured"]
            print(
                f"1.1 B parameters, {kind}: peak {measured['peak_memory_bytes'] / 1e9:.2f} GB, foreseen "
                f"{foreseen['memory_bytes'] / 1e9:.2f} GB; {measured['seconds']['total']:.0f} s",
                flush=True,
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--skip-memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    step_times(arguments)
    if not arguments.skip_memory:
        memory({"LoRA": [], "LoRA, --recompute": ["--recompute"]})


if __name__ == "__main__":
    main()
