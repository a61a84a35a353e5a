"""Speed that is real: cut models generate faster than dense ones, measured against what the FLOP ratio promises.

    python benchmarks/speed.py [--sequences 16]

Cuts the built-in model and a random Llama of about 100 M parameters by depth, by width and by both, and times prefill
and greedy decoding of the cut and the dense model in turns, whole models with a KV cache. `promised` is the ratio of
FLOPs a token in the blocks; `reached` is the speed-up divided by it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from spinecli.artifacts.directory import OutputOptions
from spinecli.checkpoints.family import Task
from spinecli.checkpoints.skeleton import build_skeleton, stored_shapes
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.tensors import ComputedTensor
from spinecli.checkpoints.writer import write_checkpoint
from spinecli.data.config import CalibrationConfig
from spinecli.evaluation.config import GenerationConfig
from spinecli.evaluation.latency import measure_latency, paired_ratio, random_prompt
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import open_request
from spinecli.pruning.run import prune

SPARSITY = 0.5
HUNDRED_MILLION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 564,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Cut:
    """One way to spend the budget."""

    name: str
    block_share: float


CUTS = (Cut("depth", 1.0), Cut("width", 0.0), Cut("both", 0.5))


def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    """Ones for norms, small normal values otherwise."""
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul_(0.02)


def make_checkpoint(directory: Path) -> Path:
    """A random Llama of about 100 M parameters with the built-in model's tokenizer."""
    config = LlamaConfig(**HUNDRED_MILLION)
    raw = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    groups = [
        {name: ComputedTensor(shape, torch.float32, partial(random_tensor, shape))}
        for name, shape in stored_shapes(build_skeleton(config, Task.causal_lm)).items()
    ]
    directory.mkdir()
    write_checkpoint(directory, raw, groups, resolve_checkpoint("builtin:tiny"))
    return directory


def row(name: str, model: str, cut: Cut, settings: GenerationConfig, work: Path) -> str:
    """Cut, time, and one line of the table."""
    rows = CalibrationConfig(text="builtin:tiny-calibration", rows=8)
    options = PruneConfig(
        model=model, sparsity=SPARSITY, method="comp", metric="m1", block_share=cut.block_share, calibration=rows
    )
    out = work / f"{name}-{cut.name}"
    report = prune(open_request(options), OutputOptions(out)).model_dump()["report"]
    promised = report["dense"]["block_flops_per_token"] / report["cut"]["block_flops_per_token"]
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (resolve_checkpoint(model), out)
    ]
    prompt = random_prompt(int(models[0].config.vocab_size), settings.length, settings.batch_size)
    dense, smaller = measure_latency(models, [prompt, prompt], settings)
    prefill, decode = paired_ratio(smaller.prefill, dense.prefill), paired_ratio(smaller.decode, dense.decode)
    share = report["achieved_sparsity"]
    return (
        f"| {name} | {cut.name} | {share:.1%} | {settings.batch_size} | {promised:.2f} | {prefill:.2f} | "
        f"{prefill / promised:.2f} | {decode:.2f} | {decode / promised:.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    work = Path(tempfile.mkdtemp(prefix="spine-speed-"))
    models = {"tiny": "builtin:tiny", "random-113M": str(make_checkpoint(work / "random"))}
    print("| model | cut | removed | sequences | promised | prefill | reached | decode | reached |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, model in models.items():
        for cut in CUTS:
            for sequences in arguments.sequences:
                settings = GenerationConfig(
                    prompt_length=128, new_tokens=32, batch_size=sequences, repeats=arguments.repeats
                )
                place = Path(tempfile.mkdtemp(dir=work))
                print(row(name, model, cut, settings, place), flush=True)


if __name__ == "__main__":
    main()
