"""The checkpoint of one point: pruned, and tuned if the sweep asks for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.stopwatch import Stopwatch
from spinecli.masktuning.recovery import TuneMethod
from spinecli.masktuning.request import TuneOptions
from spinecli.masktuning.request import open_request as open_tune
from spinecli.masktuning.run import tune
from spinecli.progress import Progress
from spinecli.pruning.run import prune
from spinecli.sweeping.request import Point, SweepRequest

POINTS = "points"
_CUTS = "cuts"
_FINDINGS = "findings"


@dataclass(frozen=True)
class Made:
    """One point's checkpoint."""

    path: Path
    achieved_sparsity: float
    removed_blocks: int
    tuned: TuneMethod | None


@dataclass(frozen=True, eq=False)
class Workshop:
    """Where checkpoints are made. Every step resumes what a killed one left there.

    state/findings/METHOD    scores and sensitivities, shared by all ratios of a method
    state/cuts/NAME          a cut that is going to be tuned
    state/points/NAME        a point that has not been measured yet
    """

    request: SweepRequest
    state: Path
    stopwatch: Stopwatch
    progress: Progress

    def make(self, point: Point) -> Made:
        """Prune and tune.

        Raises: OptionError if the model cannot be cut like that, and what `prune` and `tune` raise.
        """
        request = self.request.prune_request(point)
        tuned = self.request.options.tune.after(request.method)
        cut, final = self._folder(_CUTS) / point.name, self._folder(POINTS) / point.name
        findings = self._folder(_FINDINGS) / request.method.name
        findings.mkdir(exist_ok=True)
        output = OutputOptions(cut if tuned else final, resume=True)
        report: dict[str, Any] = prune(request, output, self.stopwatch, self.progress, findings).report
        if tuned:
            self._tune(cut, tuned, final)
        return Made(final, report["achieved_sparsity"], len(report["removed_blocks"]), tuned)

    def clear(self, point: Point, keep_in: Path | None) -> None:
        """Put a measured point's checkpoint away: into `keep_in`, or nowhere."""
        made = self.state / POINTS / point.name
        if keep_in and made.exists():
            keep_in.mkdir(exist_ok=True)
            made.rename(keep_in / point.name)
        for left in (made, self.state / _CUTS / point.name):
            shutil.rmtree(left, ignore_errors=True)

    def _tune(self, cut: Path, method: TuneMethod, final: Path) -> None:
        options = self.request.options
        request = open_tune(TuneOptions(cut, method=method, seed=options.seed, compute=options.compute))
        tune(request, OutputOptions(final, resume=True), self.stopwatch, self.progress)

    def _folder(self, name: str) -> Path:
        folder = self.state / name
        folder.mkdir(exist_ok=True)
        return folder
