"""What `enginesmith doctor` finds of GPUs and of the packages that build engines and checkpoints for them."""

from collections.abc import Iterator

from exporter.check import Check
from exporter.core.errors import EngineSmithError
from exporter.core.gpu import GpuHost, gpu_host, installed_toolkits
from exporter.core.gpu_needs import LABELS
from exporter.core.packages import installed_version

# Distribution -> what it is for, and how it is had. None is needed to write checkpoints for TensorRT-LLM.
PACKAGES = {
    "polygraphy": (
        "runs a TensorRT engine's graph on this CPU, to prove it",
        "pip install 'enginesmith[tensorrt-rtx]'",
    ),
    # Without its dependencies: they pin older versions of what we build with.
    "nvidia-modelopt": (
        "exports that our tensorrt-llm checkpoints are compared with",
        "pip install --no-deps nvidia-modelopt",
    ),
    "compressed-tensors": (
        "loads tensorrt-llm checkpoints of that format in transformers",
        "pip install --no-deps compressed-tensors",
    ),
    "tensorrt-llm": (
        "serves tensorrt-llm checkpoints; up to 1.2 compiles them for --engine",
        "pip install tensorrt-llm, on the machine with the GPUs",
    ),
}


def gpu_checks(host: GpuHost | None = None) -> Iterator[Check]:
    """GPU, driver, TensorRT and the packages around it; nothing here is required of every machine."""
    host = host or gpu_host()
    here = "" if host.gpus else "engines for GPUs can be built here by TensorRT-RTX (--device sm89), and run on a GPU"
    yield Check("gpu", bool(host.gpus), host.describe(), here, required=False)
    for name, version in installed_toolkits().items():
        yield Check(f"tensorrt: {LABELS[name]}", True, version, required=False)
    yield builder_check(host)
    for name, (purpose, remedy) in PACKAGES.items():
        yield _package(name, purpose, remedy)


def builder_check(host: GpuHost) -> Check:
    """Whether the TensorRT that would be used builds a network of one layer."""
    from targets.tensorrt.probe import build_one_layer
    from targets.tensorrt.toolkit import find_toolkit

    name = "tensorrt: builder"
    try:
        toolkit = find_toolkit(host)
    except EngineSmithError as error:
        return Check(name, False, error.message, error.remedy, required=False)
    if why := build_one_layer(toolkit):
        remedy = "a GPU and its driver, or ENGINESMITH_TENSORRT=rtx, which builds without"
        return Check(name, False, f"{toolkit.label} does not build: {why}", remedy, required=False)
    return Check(name, True, f"{toolkit.label} builds", required=False)


def _package(name: str, purpose: str, remedy: str) -> Check:
    found = f"nvidia: {name}"
    if version := installed_version(name):
        return Check(found, True, f"{version}, {purpose}", required=False)
    return Check(found, False, f"not installed; {purpose}", remedy, required=False)
