"""spine: prune, recover and measure language models for small devices.

    import spinecli as spine

Its functions and configs are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spinecli.api import Result, export, inspect, plan, prune, tune
    from spinecli.data.config import CalibrationConfig
    from spinecli.exports.config import ExportConfig
    from spinecli.federation.planning.config import PlanConfig
    from spinecli.pruning.config import PruneConfig, TuneConfig, TuneMethod

__version__ = "0.1.0"

_PLACES = {
    "prune": "api",
    "tune": "api",
    "plan": "api",
    "export": "api",
    "inspect": "api",
    "Result": "api",
    "PruneConfig": "pruning.config",
    "TuneConfig": "pruning.config",
    "TuneMethod": "pruning.config",
    "CalibrationConfig": "data.config",
    "PlanConfig": "federation.planning.config",
    "ExportConfig": "exports.config",
}
__all__ = [
    "CalibrationConfig",
    "ExportConfig",
    "PlanConfig",
    "PruneConfig",
    "Result",
    "TuneConfig",
    "TuneMethod",
    "__version__",
    "export",
    "inspect",
    "plan",
    "prune",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
