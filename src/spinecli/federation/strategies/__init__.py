"""Every strategy by the name that --strategy takes. A new one is a file beside these and a line here."""

from __future__ import annotations

from collections.abc import Callable

from spinecli.errors import OptionError
from spinecli.federation.config import SPLITTING
from spinecli.federation.strategies.fed_loraprune import FedLoRAPrune
from spinecli.federation.strategies.fedit import FedIT
from spinecli.federation.strategies.fedspine import FedSpine
from spinecli.federation.strategies.fedspine_model import FedSpineModel
from spinecli.federation.strategies.ffa_lora import FFALoRA
from spinecli.federation.strategies.flexlora import FlexLoRA
from spinecli.federation.strategies.flora import FLoRA
from spinecli.federation.strategies.hetlora import HetLoRA
from spinecli.federation.strategies.legend import Legend
from spinecli.federation.strategies.strategy import Strategy, StrategyContext

STRATEGIES: dict[str, Callable[[StrategyContext], Strategy]] = {
    "fedit": FedIT,
    "hetlora": HetLoRA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "ffa-lora": FFALoRA,
    "legend": Legend,
    "fed-loraprune": FedLoRAPrune,
    "fedspine": FedSpine,
    "fedspine-model": FedSpineModel,
}


def strategy_of(name: str) -> Callable[[StrategyContext], Strategy]:
    """The strategy called `name`; OptionError with the list of known ones."""
    try:
        return STRATEGIES[name]
    except KeyError:
        raise OptionError(f"--strategy {name} is not one of {', '.join((*STRATEGIES, *SPLITTING))}.") from None
