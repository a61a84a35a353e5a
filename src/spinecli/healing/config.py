"""What `spine heal` is asked for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from spinecli.config import Config, Device, Dtype, Option, Seed
from spinecli.data.config import SpecialTokens, as_several


class Loss(str, Enum):
    """What training lowers."""

    kl = "kl"
    """The divergence of the student's next-token distributions from the dense model's."""
    lm = "lm"
    """The negative log-likelihood of the text."""
    both = "both"
    """The sum of the two."""


class Train(str, Enum):
    """Which parameters training changes."""

    lora = "lora"
    """Factors beside the projections, merged into them in the end, and the norms."""
    full = "full"
    """All of them."""
    norms = "norms"
    """Scales and shifts of the norms."""


class HealText(Config):
    """What to train on, and how much of it."""

    text: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(as_several),
        Option(
            "Text to train on, as in spine prune --calibration; may be repeated, and a weight may follow, as in "
            "chat.jsonl:0.3. Of conversations the assistant's answers are learned.",
            default="what the cut was calibrated on",
            decides=False,
        ),
    ] = None
    tokens: Annotated[int, Field(ge=1), Option("Number of tokens to train on, repeated ones counted each time.")] = (
        500_000
    )
    epochs: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "How often to train on the same row; as many rows are read as the tokens then need. A shorter text is "
            "repeated more often.",
            default="1; 4 if the model writes the text",
        ),
    ] = None
    length: Annotated[
        int | None,
        Field(ge=2),
        Option(
            "Number of tokens in a row.", name="text-length", default="512, or as many as the model has positions for"
        ),
    ] = None
    special_tokens: Annotated[SpecialTokens, Option("How rows begin: auto or none, as in spine prune.")] = (
        SpecialTokens.auto
    )


class DistillConfig(Config):
    """How to train."""

    loss: Annotated[
        Loss,
        Option(
            "What to lower. kl: the divergence from the dense model's next-token distributions; lm: the loss on the "
            "text itself, which needs no dense model; both: their sum."
        ),
    ] = Loss.kl
    temperature: Annotated[
        float, Field(gt=0), Option("Temperature at which both models' distributions are compared.")
    ] = 1.0
    top_k: Annotated[
        int,
        Field(ge=1),
        Option("How many of the dense model's likeliest tokens to keep for each position; the rest count as one."),
    ] = 64
    train: Annotated[
        Train,
        Option("What to train. lora: factors that are merged in the end, and the norms; full: all weights; norms."),
    ] = Train.lora
    rank: Annotated[int, Field(ge=1), Option("Rank of the factors, with --train lora.")] = 16
    depth: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "How many of the last blocks get factors, with --train lora; no gradient passes below them.",
            default="all blocks",
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        Field(gt=0),
        Option("Largest learning rate; it rises at first and then falls to 0.", default="2e-3; 1e-4 with --train full"),
    ] = None
    batch_size: Annotated[int, Field(ge=1), Option("Rows in a step.")] = 4
    recompute: Annotated[
        bool,
        Option("Keep only what enters each block for the backward pass and compute the rest again: less memory."),
    ] = False

    def ranks(self, blocks: int) -> tuple[int, ...]:
        """Of the factors, by block; 0 in blocks that no gradient reaches, and 1 throughout if there are no factors."""
        if self.train is not Train.lora:
            return (1,) * blocks
        depth = min(blocks, self.depth or blocks)
        return (0,) * (blocks - depth) + (self.rank,) * depth

    @property
    def peak_learning_rate(self) -> float:
        """What is asked for, or what suits the parameters that are trained."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.train is Train.full else 2e-3


class HealConfig(Config):
    """Which pruned checkpoint to heal, on what, and how."""

    pruned: Annotated[
        Path,
        Option(
            "Directory that spine prune, tune or heal wrote, or with --dense any checkpoint.",
            argument=True,
            decides=False,
        ),
    ]
    dense: Annotated[
        str | None,
        Option(
            "The dense checkpoint to learn from.",
            default="the one that the cut was made from, where it was then",
            decides=False,
        ),
    ] = None
    text: Annotated[HealText, Option("The text that is trained on.", panel="Text")] = HealText()
    training: Annotated[DistillConfig, Option("How to train.", panel="Training")] = DistillConfig()
    seed: Seed = 0
    device: Device = "cpu"
    dtype: Dtype = "float32"
