"""The targets by name, imported only when asked for."""

from importlib import import_module

from exporter.core.errors import UnsupportedError
from targets.base import Target

# name -> (module, class); the module must import no vendor library at its top.
TARGETS = {
    "onnxruntime": ("targets.onnxruntime.target", "OnnxRuntimeTarget"),
    "tvm": ("targets.tvm.target", "TvmTarget"),
    "tensorrt": ("targets.tensorrt.target", "TensorRtTarget"),
    "tensorrt-llm": ("targets.tensorrt_llm.target", "TensorRtLlmTarget"),
}


def get_target(name: str) -> Target:
    """The target of a name; UnsupportedError names those that exist."""
    if name not in TARGETS:
        raise UnsupportedError("target.unknown", f"target {name!r} is unknown", f"available: {', '.join(TARGETS)}")
    module, attribute = TARGETS[name]
    target: Target = getattr(import_module(module), attribute)()
    return target
