"""enginesmith's Python face: build, verify and run Llama engines.

    import enginesmith
    outcome = enginesmith.build("checkpoint", target="onnxruntime", recipe="int4-rtn", out="engine")
    with enginesmith.load("engine") as engine:
        print(engine.generate("def main", max_new_tokens=32).text)

Everything is loaded when it is first used: the import itself loads neither torch nor any runtime.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.api import bench, build, calibrate, compare, inspect, plan, recipes, targets, verify
    from exporter.calibration_request import CalibrationRequest
    from exporter.core.engine_options import EngineOptions
    from exporter.core.errors import (
        ArtifactError,
        BudgetError,
        EngineSmithError,
        InputError,
        ParityError,
        UnsupportedError,
    )
    from exporter.core.recipe import Precision, Recipe
    from exporter.doctor import diagnose as doctor
    from exporter.options import BuildOptions
    from exporter.parity.report import VerifyReport
    from exporter.pipeline import BuildOutcome
    from exporter.runtime.classify import Classification
    from exporter.runtime.engine import Engine, load
    from exporter.runtime.sampling import Sampling
    from exporter.version import VERSION as __version__

_HOMES = {
    "bench": "exporter.api",
    "build": "exporter.api",
    "calibrate": "exporter.api",
    "compare": "exporter.api",
    "inspect": "exporter.api",
    "plan": "exporter.api",
    "recipes": "exporter.api",
    "targets": "exporter.api",
    "verify": "exporter.api",
    "CalibrationRequest": "exporter.calibration_request",
    "EngineOptions": "exporter.core.engine_options",
    "ArtifactError": "exporter.core.errors",
    "BudgetError": "exporter.core.errors",
    "EngineSmithError": "exporter.core.errors",
    "InputError": "exporter.core.errors",
    "ParityError": "exporter.core.errors",
    "UnsupportedError": "exporter.core.errors",
    "Precision": "exporter.core.recipe",
    "Recipe": "exporter.core.recipe",
    "doctor": "exporter.doctor",
    "BuildOptions": "exporter.options",
    "VerifyReport": "exporter.parity.report",
    "BuildOutcome": "exporter.pipeline",
    "Classification": "exporter.runtime.classify",
    "Engine": "exporter.runtime.engine",
    "load": "exporter.runtime.engine",
    "Sampling": "exporter.runtime.sampling",
    "__version__": "exporter.version",
}
_OTHER_NAMES = {"doctor": "diagnose", "__version__": "VERSION"}

__all__ = [
    "ArtifactError",
    "BudgetError",
    "BuildOptions",
    "BuildOutcome",
    "CalibrationRequest",
    "Classification",
    "Engine",
    "EngineOptions",
    "EngineSmithError",
    "InputError",
    "ParityError",
    "Precision",
    "Recipe",
    "Sampling",
    "UnsupportedError",
    "VerifyReport",
    "__version__",
    "bench",
    "build",
    "calibrate",
    "compare",
    "doctor",
    "inspect",
    "load",
    "plan",
    "recipes",
    "targets",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'enginesmith' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), _OTHER_NAMES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
