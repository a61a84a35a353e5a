"""What pruning strategies share: who has lost what, how far the next cut may go, and what each class would run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from pydantic import JsonValue
from torch import Tensor

from spinecli.checkpoints.masks import Masks
from spinecli.errors import OptionError
from spinecli.federation.client.device import importance_from, importance_tensors, mask_tensors, masks_from
from spinecli.federation.client.local_pruning import Importance, narrowed
from spinecli.federation.config import ScoreName
from spinecli.federation.strategies.server import AdapterServer
from spinecli.federation.strategies.strategy import (
    ClientUpdate,
    DeployedModel,
    GlobalModel,
    Ratio,
    StrategyContext,
    TrainInstruction,
)
from spinecli.lora.aggregation.contribution import restricted

WARM_UP = 0.1
"""Share of the rounds in which devices only measure importance, as LoRAPrune's warm-up does in its steps."""
PRUNED_BY = 0.7
"""Share of the rounds after which every device that takes part stands at the target sparsity; the rest only tunes."""
LARGEST_STEP = 0.1
"""Most that a device's pruning ratio rises in one round, unless it takes part too rarely to arrive in time."""
_KEEP = 0.8
"""Share of the old class importance when a device of the class reports."""


class PruningServer(AdapterServer):
    """Masks by device and importance by class, on top of a global adapter that is never cut itself.

    Args:
        score: the importance that devices measure, unless the user chose one.
        shared: devices start from the fleet's importance and cut before their first step. Otherwise each starts from
            its own, and cuts on the way.
    """

    def __init__(
        self, setting: StrategyContext, ranks: Sequence[int], score: ScoreName, *, shared: bool = False
    ) -> None:
        super().__init__(setting, ranks)
        chosen = setting.config.pruning.score or score
        if chosen == "lora":
            _require_all_groups(setting)
        self.score: ScoreName = chosen
        self.masks: dict[str, Masks] = {}
        self.rounds_done = 0
        self._shared = shared
        self.class_of = {node.name: node.device_class for node in setting.nodes}
        self._importance: dict[str, list[Importance]] = {}

    @property
    def sparsity(self) -> float:
        """The pruning ratio that all devices end at: what whole units make of the sparsity that was asked for."""
        cuts = self.setting.cuts
        return cuts.ratio_of(cuts.widths_at(self.setting.config.pruning.sparsity))

    def ratio(self, device: str) -> float:
        """Where a device stands."""
        cuts = self.setting.cuts
        return cuts.ratio_of(cuts.widths_of(self.masks[device])) if device in self.masks else 0.0

    def is_warming_up(self, round_number: int) -> bool:
        """Whether devices only measure importance yet."""
        return round_number < WARM_UP * self.setting.config.train.rounds

    def may_only_tune(self, round_number: int) -> bool:
        """Whether the target is due: who is not there yet goes there at once."""
        return round_number >= PRUNED_BY * self.setting.config.train.rounds

    def largest_step(self, round_number: int, device: str) -> float:
        """The most that a device's ratio may rise in this round.

        A device that is drawn rarely must take larger steps to arrive in time: the rest of its way over the rounds in
        which it will still take part, on average, before the target is due.
        """
        remaining = max(self.sparsity - self.ratio(device), 0.0)
        return min(remaining, max(LARGEST_STEP, remaining / self.visits_left(round_number)))

    def visits_left(self, round_number: int) -> float:
        """Rounds in which a device can expect to be cut until the target is due, this one included."""
        rounds = self.setting.config.train.rounds
        share = min(1.0, self.setting.config.train.cohort / len(self.setting.nodes))
        return max(1.0, (PRUNED_BY * rounds - max(round_number, WARM_UP * rounds)) * share)

    def pruning_order(self, round_number: int, device: str, ranks: Sequence[int], target: float) -> TrainInstruction:
        """Train at `ranks` and prune to `target`; the factors come in the shape of the device's masks."""
        rows, columns = self.setting.kept_units(self.masks.get(device))
        adapter = {
            name: restricted(factors, rows.get(name), columns.get(name)) for name, factors in self.cut_to(ranks).items()
        }
        warming_up = self.is_warming_up(round_number)
        wanted = self.ratio(device) if warming_up else min(max(target, self.ratio(device)), self.sparsity)
        importance = self.fleet_importance() if self._shared else None
        pruning = Ratio(wanted, self.sparsity, self.score, collect_only=warming_up, importance=importance)
        return TrainInstruction(tuple(ranks), adapter, self.head, pruning=pruning)

    def masks_of(self, device: str) -> Masks | None:
        """The masks that a device last reported; None before its first."""
        return self.masks.get(device)

    def note(self, updates: Sequence[ClientUpdate]) -> None:
        """Remember the masks of the devices and the importance of their classes."""
        for update in updates:
            if update.masks is None or update.importance is None:
                continue
            self.masks[update.device] = update.masks
            name = self.class_of[update.device]
            before = self._importance.get(name)
            self._importance[name] = (
                list(update.importance) if before is None else _mixed([(_KEEP, before), (1 - _KEEP, update.importance)])
            )

    def fleet_importance(self) -> list[Importance] | None:
        """The mean importance of the classes that have reported, by their devices; None before the first report."""
        if not self._importance:
            return None
        counts = self._counts()
        total = sum(counts[name] for name in self._importance)
        return _mixed([(counts[name] / total, each) for name, each in self._importance.items()])

    def _counts(self) -> Counter[str]:
        """Devices of every class."""
        return Counter(self.class_of.values())

    def model(self) -> GlobalModel:
        """For each class of devices the consensus of its importance, cut as far as its devices are on average.

        Once the target is due, that is the target. A class that has not reported is cut by what the others say.
        """
        served = [DeployedModel(name, count, *self._consensus(name)) for name, count in self._counts().items()]
        return GlobalModel(self.adapter, self.head, served)

    def _consensus(self, device_class: str) -> tuple[Masks | None, float]:
        importance = self._importance.get(device_class) or self.fleet_importance()
        if importance is None:
            return None, 0.0
        seen = [device for device in self.masks if self.class_of[device] == device_class] or list(self.masks)
        cuts = self.setting.cuts
        due = self.may_only_tune(self.rounds_done)
        ratio = self.sparsity if due else sum(self.ratio(device) for device in seen) / len(seen)
        widths = cuts.widths_at(ratio)
        full = Masks.full(self.setting.shapes)
        return narrowed(full, widths, importance, cuts.dense), cuts.ratio_of(widths)

    def values(self) -> dict[str, JsonValue]:
        """How far the rounds are, and whose masks and importance the tensors are."""
        return {"rounds_done": self.rounds_done, "masked": list(self.masks), "classes": list(self._importance)}

    def tensors(self) -> Mapping[str, Tensor]:
        """Masks by device and importance by class."""
        masks = {
            f"{device}/{name}": value
            for device, each in self.masks.items()
            for name, value in mask_tensors(each).items()
        }
        importance = {
            f"{name}/{key}": value
            for name, each in self._importance.items()
            for key, value in importance_tensors(each).items()
        }
        return masks | importance

    def recall(self, values: Mapping[str, JsonValue], tensors: Mapping[str, Tensor]) -> None:
        """Take back masks and importance."""
        masked, classes, done = values["masked"], values["classes"], values["rounds_done"]
        assert isinstance(masked, list)
        assert isinstance(classes, list)
        assert isinstance(done, int)
        self.rounds_done = done
        blocks = self.setting.blocks
        self.masks = {str(device): masks_from(_under(str(device), tensors), blocks) for device in masked}
        self._importance = {str(name): importance_from(_under(str(name), tensors), blocks) for name in classes}


def _require_all_groups(setting: StrategyContext) -> None:
    """The factors' gradients tell nothing of units whose projections carry no factors."""
    attention, feed_forward = setting.family.attention, setting.family.feed_forward
    names = {name.partition(f"{setting.family.blocks}.0.")[2] for name in setting.projections}
    scored = bool(names & {*feed_forward.inputs, feed_forward.output})
    if len(setting.cuts.kv_counts) > 1:
        scored = scored and bool(names & set(attention.projections))
    if not scored:
        raise OptionError(
            "--score lora measures only what carries LoRA; take --targets all, or --score salience, which needs none."
        )


def _mixed(parts: Sequence[tuple[float, Sequence[Importance]]]) -> list[Importance]:
    """The sum of importance in these shares, block by block."""
    return [
        Importance(
            torch.stack([share * each.heads for (share, _), each in zip(parts, block, strict=True)]).sum(dim=0),
            torch.stack([share * each.channels for (share, _), each in zip(parts, block, strict=True)]).sum(dim=0),
        )
        for block in zip(*(importance for _, importance in parts), strict=True)
    ]


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
