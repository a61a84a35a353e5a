"""FFA-LoRA: A is frozen and the same everywhere, so the mean of B is exact, and only B travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spinecli.federation.strategies.fedit import FedIT
from spinecli.federation.strategies.strategy import TrainInstruction


class FFALoRA(FedIT):
    """FedIT with A frozen as it was drawn."""

    def configure_train(self, round_number: int, cohort: Sequence[str]) -> dict[str, TrainInstruction]:
        """The same for all, B alone."""
        instructions = super().configure_train(round_number, cohort)
        return {device: replace(instruction, shared_a=True) for device, instruction in instructions.items()}
