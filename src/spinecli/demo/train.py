"""Train the built-in model from nothing: ``python -m spinecli.demo.train --out DIR``.

Every step sees new stories, so there is no training set to run out of and nothing to
over-fit.  One processor core needs about half an hour.  Needs PyTorch 2.9 or later, for Muon.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from spinecli.demo.language import Document, floor_perplexity, generate, vocabulary, write_story
from spinecli.demo.vocabulary import END

PAD, UNKNOWN, START = "<pad>", "<unk>", "<bos>"


def build_tokenizer(longest: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, for contexts of at most ``longest`` tokens.

    A line break ends a story, so it is read as the end token and the end token is written
    as a line break.
    """
    words = list(dict.fromkeys((PAD, UNKNOWN, START, *vocabulary())))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s*\n\s*"), f" {END} "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.,]"), "isolated")]
    )
    # The word-piece decoder is here for its clean-up of the space before punctuation.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(f" ?{END} ?"), "\n"),
        ]
    )
    start = words.index(START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


CONTEXT = 256
"""Longest context of the model and length of a training row, in tokens."""
HELD_OUT_SEED = 900_001
FIRST_TRAINING_SEED = 1_000_000_000
"""Added to the seed of the recipe, so that no text made from a small seed is a training text."""
FRESH_START, MIDDLE_START = 0.6, 0.15
"""Shares of rows that open with the start token before a whole story and before the
middle of one; the rest open in the middle of a story with no start token."""


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that decides how the model comes out."""

    seed: int = 0
    steps: int = 2000
    rows: int = 8
    """Rows of ``CONTEXT`` tokens in one step."""
    peak_rate: float = 5e-3
    warm_up: int = 60
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.05


@dataclass(frozen=True)
class TrainingPoint:
    """One line of the training curve; losses are in nats per token."""

    step: int
    tokens: int
    loss: float
    held_out_loss: float
    floor: float


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model: ten blocks, about two million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # A block that begins by adding nothing leaves the words readable to all blocks above it from
    # the first step; with random outputs the model takes many times longer to learn to look back.
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_length=CONTEXT,
    )
    return model


def training_rows(ids: dict[str, int], rng: Random) -> Iterator[list[int]]:
    """Endless rows of ``CONTEXT`` token ids, stories one after the other."""
    rest: list[int] = []
    while True:
        mark = rng.random()
        row = [ids[START]] if mark < FRESH_START + MIDDLE_START else []
        if mark < FRESH_START:
            rest = []
        row += rest
        while len(row) < CONTEXT:
            row += [ids[word] for word in write_story(rng).words]
        rest = row[CONTEXT:]
        yield row[:CONTEXT]


@torch.inference_mode()
def story_loss(model: LlamaForCausalLM, ids: dict[str, int], stories: list[Document]) -> float:
    """Mean loss in nats per token over whole stories, each read from its first word."""
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(stories), 16):
        rows = [[ids[START], *(ids[word] for word in story.words)] for story in stories[first : first + 16]]
        width = max(map(len, rows))
        inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # (stories, width)
        targets = torch.tensor([row[1:] + [-100] * (width - len(row)) for row in rows])  # (stories, width - 1)
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100, reduction="sum"
        ).item()
        count += int((targets >= 0).sum())
    model.train()
    return total / count


def rate_at(step: int, recipe: TrainingSetup) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < recipe.warm_up:
        return recipe.peak_rate * (step + 1) / recipe.warm_up
    progress = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return recipe.peak_rate * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def optimizers_for(model: LlamaForCausalLM, recipe: TrainingSetup) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            inner,
            lr=recipe.peak_rate,
            weight_decay=recipe.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(outer, lr=recipe.peak_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(recipe: TrainingSetup, out: Path, every: int = 100) -> LlamaForCausalLM:
    """Train and save to ``out``, with a checkpoint and a point of the curve ``every`` so many steps."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(CONTEXT)
    ids: dict[str, int] = tokenizer.get_vocab()
    model = new_model(tokenizer)
    optimizers = optimizers_for(model, recipe)
    rows = training_rows(ids, Random(FIRST_TRAINING_SEED + recipe.seed))
    held_out = generate(documents=100, seed=HELD_OUT_SEED)
    floor = math.log(floor_perplexity(held_out))
    curve: list[TrainingPoint] = []
    recent: list[float] = []
    began = time.monotonic()
    for step in range(recipe.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate_at(step, recipe)
        batch = torch.tensor([next(rows) for _ in range(recipe.rows)])  # (rows, CONTEXT)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        done = step + 1
        if done % every == 0 or done == recipe.steps:
            held_out_loss = story_loss(model, ids, held_out)
            curve.append(TrainingPoint(done, done * batch.numel(), sum(recent) / len(recent), held_out_loss, floor))
            recent = []
            save(model, tokenizer, curve, out)
            print(
                f"step {done}/{recipe.steps}  loss {curve[-1].loss:.4f}  held out {held_out_loss:.4f}  "
                f"floor {floor:.4f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, curve: list[TrainingPoint], out: Path) -> None:
    """Write model, tokenizer and training curve to ``out``."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    with (out / "training_curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "tokens", "loss", "held_out_loss", "floor"))
        for p in curve:
            writer.writerow((p.step, p.tokens, f"{p.loss:.4f}", f"{p.held_out_loss:.4f}", f"{p.floor:.4f}"))


def main() -> None:
    """Read the command line and train."""
    defaults = TrainingSetup()
    parser = argparse.ArgumentParser(prog="python -m spinecli.demo.train", description="Train the built-in model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the model to")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps of 2048 tokens")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(TrainingSetup(seed=arguments.seed, steps=arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
