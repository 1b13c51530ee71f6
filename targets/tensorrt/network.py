"""A graph as TensorRT parses it, with the configuration that it is built with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.core.errors import InputError
from targets.tensorrt.build_log import BuildLog, make_logger
from targets.tensorrt.parse_errors import parser_error
from targets.tensorrt.plan_report import DETAILED, EngineRequest
from targets.tensorrt.profiles import BATCH, LENGTH, Profile, shapes
from targets.tensorrt.toolkit import Toolkit


@dataclass(frozen=True)
class Parsed:
    """A parsed network with everything that it points into: all of it has to live as long as the network is used."""

    toolkit: Toolkit
    log: BuildLog
    logger: Any
    builder: Any
    network: Any
    parser: Any


def parse_model(toolkit: Toolkit, model: Path, prefix: bytes | None = None) -> Parsed:
    """Parse model.onnx with its external weights, or a `prefix` of it whose weights lie beside it.

    Raises UnsupportedError `tensorrt.parser` with the names of the nodes that are refused.
    """
    module, log = toolkit.module, BuildLog()
    logger = make_logger(module, log)
    builder = module.Builder(logger)
    builder.max_threads = 1  # with more, two builds of one graph may differ
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(model)) if prefix is None else parser.parse(prefix, str(model))
    if not parsed:
        raise parser_error(toolkit, parser, log)
    return Parsed(toolkit, log, logger, builder, network, parser)


def configure(parsed: Parsed, request: EngineRequest) -> Any:
    """The builder's configuration for a request: GPUs, compatibility, profiles, timing cache."""
    module, config = parsed.toolkit.module, parsed.builder.create_builder_config()
    _set_devices(parsed.toolkit, config, request)
    if request.version_compatible:
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if request.verbosity == DETAILED:
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    for profile in request.profiles:
        _add_profile(parsed, config, profile)
    if request.timing_cache is not None and not parsed.toolkit.is_rtx:
        _use_timing_cache(config, request.timing_cache)
    return config


def _set_devices(toolkit: Toolkit, config: Any, request: EngineRequest) -> None:
    """RTX compiles for the capabilities set, or where none is for its own list; TensorRT for the GPU at hand."""
    module, device = toolkit.module, request.device
    if toolkit.is_rtx and not device.portable:
        config.num_compute_capabilities = len(device.capabilities)
        for index, capability in enumerate(device.capabilities):
            config.set_compute_capability(getattr(module.ComputeCapability, f"SM{capability.replace('.', '')}"), index)
    if not toolkit.is_rtx and request.hardware_compatible:
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS


def dimensions(tensor: Any) -> tuple[int | str, ...]:
    """An input's or output's axes: sizes, or `B` and `S` where they vary. The first is rows if it has no name."""
    names = [tensor.get_dimension_name(axis) or (LENGTH if axis else BATCH) for axis in range(len(tensor.shape))]
    return tuple(size if size >= 0 else name for size, name in zip(tensor.shape, names, strict=True))


def inputs(network: Any) -> Iterator[Any]:
    return (network.get_input(index) for index in range(network.num_inputs))


def outputs(network: Any) -> Iterator[Any]:
    return (network.get_output(index) for index in range(network.num_outputs))


def _add_profile(parsed: Parsed, config: Any, profile: Profile) -> None:
    added = parsed.builder.create_optimization_profile()
    for tensor in inputs(parsed.network):
        axes = dimensions(tensor)
        if any(isinstance(axis, str) for axis in axes):
            added.set_shape(tensor.name, *shapes(profile, axes))
    if config.add_optimization_profile(added) < 0:
        raise ValueError(f"profile {profile.name} does not fit the network: {parsed.log.errors}")


def _use_timing_cache(config: Any, file: Path) -> None:
    """Kernels measured before on such a GPU with this version are not measured again."""
    if file.is_dir() or not file.parent.is_dir():
        why = f"--timing-cache {file} cannot be written: it is a directory, or stands in none"
        raise InputError("tensorrt.timing_cache", why, "name a file in an existing directory")
    cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        why = f"{file} is no timing cache of this TensorRT version and GPU"
        raise InputError("tensorrt.timing_cache", why, "name another file, or delete it to measure anew")


def write_timing_cache(config: Any, file: Path) -> None:
    """What was measured, for the next build; the old file stays until the new one is complete."""
    beside = file.with_name(f".{file.name}.new")
    try:
        beside.write_bytes(config.get_timing_cache().serialize())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
