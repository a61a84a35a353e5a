"""Exported GGUF files in real llama.cpp: how far their logits are from torch's, and whether they write the same text.

    python benchmarks/export_llamacpp.py [--models english-7M stories260K tiny] [--new-tokens 32]

Each checkpoint is cut in the ways that a file must carry: equally (`spine prune`), by whole blocks, and with masks that
give every block its own heads and channels or take a sub-layer away. Each cut is exported three times. f32 is opened
with a float32 cache and shows whether the file says the same as the checkpoint; f16 and q8_0 are opened as llama.cpp
opens files, with a float16 cache. Differences are the largest over 128 tokens of the evaluation text, relative to the
largest logit of torch in float32. The text is continued greedily from its first 16 tokens, by torch without a cache.

Needs llama-cpp-python and gguf. Checkpoints other than the built-in one are read from ../shared and skipped where they
are absent.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from settings import Setting, settings
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinecli.artifacts.context import RunContext
from spinecli.artifacts.directory import OutputOptions
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.checkpoints.source import resolve_checkpoint
from spinecli.checkpoints.tokenizer import load_tokenizer
from spinecli.data.config import CalibrationConfig
from spinecli.data.rows import token_rows
from spinecli.data.text import load_text
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.exports import llamacpp
from spinecli.exports.run import ExportConfig, export, open_request
from spinecli.exports.verification import relative_difference
from spinecli.pruning.config import PruneConfig
from spinecli.pruning.request import open_request as open_prune
from spinecli.pruning.run import prune

LENGTH, PROMPT = 128, 16
TOLERANCE = 5e-3


def by_prune(sparsity: float, method: str) -> Callable[[Setting, Path], None]:
    """A cut by `spine prune`."""

    def cut(setting: Setting, out: Path) -> None:
        options = PruneConfig(
            model=setting.model,
            sparsity=sparsity,
            method=method,
            calibration=CalibrationConfig(text=setting.calibration, rows=16),
        )
        prune(open_prune(options), OutputOptions(out))

    return cut


def by_masks(groups: Callable[[int, int], int], channels: Callable[[int, int], int]) -> Callable[[Setting, Path], None]:
    """A cut that keeps the first KV groups and channels of each block.

    Args:
        groups: (block, KV groups) -> how many stay; `channels` likewise.
    """

    def cut(setting: Setting, out: Path) -> None:
        checkpoint = Checkpoint.open(resolve_checkpoint(setting.model))
        shape = checkpoint.shape
        blocks = []
        for index in range(checkpoint.blocks):
            heads = torch.arange(shape.heads) < groups(index, shape.kv_heads) * shape.group_size
            blocks.append(BlockMask(heads, torch.arange(shape.channels) < channels(index, shape.channels)))
        out.mkdir()
        write_cut(out, checkpoint, Masks(tuple(blocks)))

    return cut


CUTS: dict[str, Callable[[Setting, Path], None]] = {
    "dense": by_masks(lambda block, groups: groups, lambda block, channels: channels),
    "equal, 30 %": by_prune(0.3, "magnitude"),
    "blocks removed, 40 %": by_prune(0.4, "shortgpt"),
    "widths differ": by_masks(
        lambda block, groups: groups - block % 3, lambda block, channels: channels * (block % 3 + 2) // 4 // 4 * 4
    ),
    "attention removed in every second block": by_masks(
        lambda block, groups: 0 if block % 2 else groups, lambda block, channels: channels
    ),
    "attention of block 0 removed": by_masks(
        lambda block, groups: groups if block else 0, lambda block, channels: channels
    ),
    "feed-forward removed in every third block": by_masks(
        lambda block, groups: groups, lambda block, channels: 0 if block % 3 == 1 else channels
    ),
}


@torch.no_grad()
def continued(model: PreTrainedModel, prompt: Tensor, count: int) -> list[int]:
    """The likeliest next tokens, the whole row computed anew for each."""
    row = prompt
    for _ in range(count):
        row = torch.cat((row, model(row[None], use_cache=False).logits[0, -1].argmax()[None]))
    return row[len(prompt) :].tolist()


def line(setting: Setting, label: str, cut: Callable[[Setting, Path], None], new_tokens: int) -> tuple[str, bool]:
    """One row of the table, and whether it holds what is promised."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "cut"
        cut(setting, directory)
        checkpoint = Checkpoint.open(directory)
        tokens = token_rows(load_tokenizer(directory), load_text(setting.evaluation), 1, LENGTH).tokens[0]
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            expected = model(tokens[None], use_cache=False).logits[0]
        wanted = continued(model, tokens[:PROMPT], new_tokens)
        differences, sizes, alike, architecture = {}, {}, 0, ""
        for quantize in ("f32", "f16", "q8_0"):
            out = Path(folder) / f"{quantize}.gguf"
            request = open_request(ExportConfig(str(directory), "gguf", out, quantize=quantize))
            architecture = str(export(request, RunContext()).report["architecture"])
            sizes[quantize] = out.stat().st_size
            with llamacpp.opened(out, context=LENGTH, precise=quantize == "f32") as opened:
                differences[quantize] = relative_difference(llamacpp.logits(opened, tokens.tolist()), expected)
                if quantize == "f16":
                    found = llamacpp.greedy(opened, tokens[:PROMPT].tolist(), new_tokens)
                    same = [left == right for left, right in zip(found, wanted, strict=True)]
                    alike = (*same, False).index(False)
        shapes = sorted({f"{shape.heads}/{shape.kv_heads}/{shape.channels}" for shape in checkpoint.shapes})
        cells = [
            setting.name,
            label,
            f"{checkpoint.blocks}: {', '.join(shapes) if len(shapes) < 4 else f'{len(shapes)} shapes'}",
            architecture,
            *(f"{differences[quantize]:.1e}" for quantize in differences),
            f"{alike} of {new_tokens}",
            " / ".join(f"{sizes[quantize] / 1e6:.2f}" for quantize in ("f16", "q8_0")),
        ]
    holds = differences["f16"] < TOLERANCE and alike == new_tokens
    return "| " + " | ".join(cells) + " |", holds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["english-7M", "stories260K", "tiny"])
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    if not llamacpp.available():
        parser.error("llama-cpp-python is not installed: pip install llama-cpp-python")
    torch.set_num_threads(1)
    heads = ["checkpoint", "cut", "blocks: heads / KV heads / channels", "written as"]
    heads += ["f32 exact", "f16", "q8_0", "same greedy tokens, f16", "MB, f16 / q8_0"]
    print("| " + " | ".join(heads) + " |")
    print("| --- | --- | --- | --- " + "| ---: " * 5 + "|")
    held = []
    for setting in settings(arguments.models):
        for label, cut in CUTS.items():
            with quiet_libraries():
                text, holds = line(setting, label, cut, arguments.new_tokens)
            print(text, flush=True)
            held.append(holds)
    print(f"\n{sum(held)} of {len(held)} within {TOLERANCE:g} and with the same text")


if __name__ == "__main__":
    main()
