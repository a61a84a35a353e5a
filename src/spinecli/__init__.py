"""spine: prune, recover and measure language models for small devices.

    import spinecli as spine

Its functions and configs are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spinecli.api import (
        EvaluationResult,
        Result,
        bench,
        evaluate,
        export,
        federate,
        heal,
        inspect,
        plan,
        prune,
        sweep,
        tune,
    )
    from spinecli.data.config import CalibrationConfig
    from spinecli.evaluation.bench.config import BenchConfig
    from spinecli.evaluation.config import EvaluateConfig
    from spinecli.evaluation.sweep.config import SweepConfig
    from spinecli.exports.config import ExportConfig
    from spinecli.federation.config import FederateConfig
    from spinecli.federation.planning.config import PlanConfig
    from spinecli.healing.config import HealConfig
    from spinecli.pruning.config import PruneConfig, TuneConfig, TuneMethod

__version__ = "0.1.0"
__all__ = [
    "BenchConfig",
    "CalibrationConfig",
    "EvaluateConfig",
    "EvaluationResult",
    "ExportConfig",
    "FederateConfig",
    "HealConfig",
    "PlanConfig",
    "PruneConfig",
    "Result",
    "SweepConfig",
    "TuneConfig",
    "TuneMethod",
    "__version__",
    "bench",
    "evaluate",
    "export",
    "federate",
    "heal",
    "inspect",
    "plan",
    "prune",
    "sweep",
    "tune",
]

_CONFIGS = {
    "BenchConfig": "evaluation.bench.config",
    "CalibrationConfig": "data.config",
    "EvaluateConfig": "evaluation.config",
    "ExportConfig": "exports.config",
    "FederateConfig": "federation.config",
    "HealConfig": "healing.config",
    "PlanConfig": "federation.planning.config",
    "PruneConfig": "pruning.config",
    "SweepConfig": "evaluation.sweep.config",
    "TuneConfig": "pruning.config",
    "TuneMethod": "pruning.config",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_CONFIGS.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
