"""What training lowers, computed from hidden states a few positions at a time, so that logits are never whole.

    kl    T² Σ_j p_j log(p_j / q_j)    over the teacher's k likeliest tokens j and the rest as one outcome
    lm    -log q_y                     y: the next token of the text

p and q are the teacher's and the student's probabilities at temperature T, for kl; T² keeps the gradient's size (Hinton
et al., Distilling the Knowledge in a Neural Network, 2015). Taking the rest as one outcome is this project's reading of
a distillation from the largest logits; it makes kl a lower bound of the whole divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spinecli.healing.config import Loss
from spinecli.healing.processes import Processes
from spinecli.healing.targets import Targets

# Logits in memory at once. Autograd holds about three tensors more of their size.
LOGIT_BYTES = 64 << 20
_LEAST_REST = 1e-6


@dataclass(frozen=True)
class Sums:
    """Losses summed over positions."""

    kl: float
    lm: float
    positions: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.kl + other.kl, self.lm + other.lm, self.positions + other.positions)

    def over(self, processes: Processes) -> Sums:
        """With the positions of all of them."""
        summed = processes.total(torch.tensor([self.kl, self.lm, float(self.positions)], dtype=torch.float64))
        kl, lm, positions = summed.tolist()
        return Sums(kl, lm, int(positions))

    def of(self, loss: Loss) -> float:
        """The mean of what `loss` lowers."""
        total = {Loss.kl: self.kl, Loss.lm: self.lm, Loss.both: self.kl + self.lm}[loss]
        return total / max(1, self.positions)


def divergence(log_probabilities: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """Kl of each position, (positions,).

    Args:
        log_probabilities: the student's at the same temperature, (positions, vocabulary).
    """
    ours = log_probabilities.gather(-1, targets.tokens)
    theirs = targets.log_probabilities
    rest = (1 - theirs.exp().sum(dim=-1)).clamp_min(0)
    our_rest = (1 - ours.exp().sum(dim=-1)).clamp_min(_LEAST_REST)
    kept = (theirs.exp() * (theirs - ours)).sum(dim=-1)
    found: Tensor = temperature**2 * (kept + torch.special.xlogy(rest, rest) - rest * our_rest.log())
    return found


class LanguageHead(Protocol):
    """From hidden states behind the final norm to logits."""

    @property
    def vocabulary(self) -> int:
        """Number of logits."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """(positions, d_model) -> (positions, vocabulary)."""


def loss_sums(
    hidden: Tensor,
    head: LanguageHead,
    following: Tensor,
    targets: Targets | None,
    loss: Loss,
    temperature: float,
    *,
    scale: float | None = None,
) -> Sums:
    """The losses of some positions, and with `scale` also the gradients of what is lowered.

    Gradients are added to those of `hidden`, a leaf, and of the head's parameters, one chunk of positions after the
    other.

    Args:
        hidden: (positions, d_model) behind the final norm.
        following: (positions,) int64, the token that comes next.
        targets: of the teacher, which kl needs.
        scale: of the gradients; None computes none.
    """
    total = Sums(0.0, 0.0, 0)
    together = max(16, LOGIT_BYTES // (4 * head.vocabulary))
    for start in range(0, len(hidden), together):
        part = slice(start, start + together)
        with torch.set_grad_enabled(scale is not None):
            logits = head(hidden[part]).float()
            ours = logits.log_softmax(dim=-1)
            lm = -ours.gather(-1, following[part, None]).sum()
            kl = lm.new_zeros(())
            if targets is not None:
                tempered = ours if temperature == 1 else (logits / temperature).log_softmax(dim=-1)
                these = Targets(targets.tokens[part], targets.log_probabilities[part])
                kl = divergence(tempered, these, temperature).sum()
            if scale is not None:
                lowered = {Loss.kl: kl, Loss.lm: lm, Loss.both: kl + lm}[loss]
                (lowered * scale).backward()  # type: ignore[no-untyped-call]
        total += Sums(float(kl.detach()), float(lm.detach()), len(logits))
    return total
