"""TensorRT-RTX's parser and builder, called directly: what it says of a graph, independent of the project's builder."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BATCH, PROMPT = 3, 16


@dataclass(frozen=True)
class Kernel:
    """A layer of an engine: its kind (`gemm`, `kgen`, `runtime_fusion`) and the types that it reads and writes."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    """A parsed network's layers by type, the engine's bytes (empty: refused), its kernels, and what was complained."""

    layers: Counter[str]
    plan: bytes
    kernels: tuple[Kernel, ...]
    complaints: tuple[str, ...]


def build(model: Path, capability: str = "SM89", classify: bool = False) -> Built:
    """Parse and build for one kind of GPU; steps of one token and of prompts, or prompts alone."""
    trt = pytest.importorskip("tensorrt_rtx")
    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            messages.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        faults = [f"{parser.get_error(i).node_name()}: {parser.get_error(i).desc()}" for i in range(parser.num_errors)]
        return Built(Counter(), b"", (), tuple(faults))
    layers = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    for sequence in ((1, PROMPT),) if classify else ((1, 1), (1, PROMPT)):
        config.add_optimization_profile(_profile(builder, network, *sequence))
    plan = builder.build_serialized_network(network, config)
    complaints = tuple(message for message in messages if "rror" in message) if plan is None else ()
    return Built(layers, b"" if plan is None else bytes(plan), _kernels(messages), complaints)


def _profile(builder: Any, network: Any, least: int, most: int) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sides = [(1, 1, BATCH), (least, most, most)]
        ranges = [sides[axis] if size == -1 else (size, size, size) for axis, size in enumerate(tuple(tensor.shape))]
        profile.set_shape(tensor.name, *zip(*ranges, strict=True))
    return profile


def _kernels(messages: list[str]) -> tuple[Kernel, ...]:
    """From the list of layers that the builder logs at the end."""
    pattern = re.compile(
        r"Name: (.*?), LayerType: (.*?), Inputs: (.*?)(?:, Constants: (.*?))?, Outputs: (.*?), TacticN"
    )
    found = [match for message in messages if message.startswith("Layers:") for match in pattern.finditer(message)]
    return tuple(Kernel(m[2], m[1], _types(m[3]), _types(m[4]), _types(m[5])) for m in found)


def _types(tensors: str | None) -> tuple[str, ...]:
    return tuple(re.findall(r"Datatype: (\w+)", tensors or ""))
