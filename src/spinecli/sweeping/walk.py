"""The walk over all points of a sweep: each is made, measured, recorded and put away before the next one begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from spinecli.artifacts.directory import WorkDirectory
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import OptionError
from spinecli.evaluation.models import Subject
from spinecli.evaluation.session import Listeners
from spinecli.masktuning.recovery_pass import held_out_rows
from spinecli.sweeping.held_out import HeldOut, hold_out
from spinecli.sweeping.ledger import Ledger
from spinecli.sweeping.making import POINTS, Workshop
from spinecli.sweeping.measuring import Label, measure
from spinecli.sweeping.request import Point, SweepRequest
from spinecli.sweeping.results import Refusal, Row

_FIGURES = "figures"


@dataclass(frozen=True, eq=False)
class Walk:
    """Everything that the points have in common."""

    request: SweepRequest
    work: WorkDirectory
    stopwatch: Stopwatch
    listeners: Listeners

    def rows(self) -> list[Row | Refusal]:
        """All figures, the dense model's first.

        Raises: OptionError if no point can be cut, and what `prune`, `tune` and measuring raise.
        """
        request, ledger = self.request, Ledger(self.work.state / _FIGURES)
        workshop = Workshop(request, self.work.state, self.stopwatch, self.listeners.progress)
        calibration = request.calibration
        tokens, opening = calibration.tokens[-held_out_rows(calibration.rows) :], len(calibration.frame.opening)
        held_out = hold_out(request.subject.checkpoint, tokens, request.options.compute, self.stopwatch, opening)
        rows = [ledger.recorded("dense", partial(measure, request, request.subject, Label("dense"), held_out))]
        self._tell(rows[0], 0)
        for done, point in enumerate(request.points, start=1):
            rows.append(ledger.recorded(point.name, partial(self._point, workshop, point, held_out)))
            workshop.clear(point, self.work.files / POINTS if request.options.keep else None)
            self._tell(rows[-1], done)
        refused = [row for row in rows if isinstance(row, Refusal)]
        if len(refused) == len(request.points):
            raise OptionError(refused[0].reason)
        return rows

    def _point(self, workshop: Workshop, point: Point, held_out: HeldOut) -> Row | Refusal:
        method = point.choice.name
        try:
            made = workshop.make(point)
        except OptionError as error:
            # what one ratio asks too much of must not end the others
            return Refusal(name=point.name, method=method, sparsity=point.sparsity, reason=str(error))
        subject = Subject(point.name, str(made.path), Checkpoint.open(made.path))
        tuned = made.tuned.value if made.tuned else None
        label = Label(point.name, method, tuned, point.sparsity, made.achieved_sparsity, made.removed_blocks)
        return measure(self.request, subject, label, held_out)

    def _tell(self, found: Row | Refusal, done: int) -> None:
        self.listeners.progress("points", done, len(self.request.points))
        if isinstance(found, Refusal):
            self.listeners.note(f"{found.name}: left out. {found.reason}")
            return
        figures = [f"{found.achieved_sparsity:.1%} removed"] if found.method else []
        figures += [f"perplexity {value:.4g} on {text}" for text, value in found.perplexity.items()]
        figures += [] if found.perplexity else [f"held-out {found.held_out:.4f}"]
        self.listeners.note(f"{found.name}: {', '.join(figures)}")
