"""Tracing a Llama from its config alone: the raw slices of every layer, no weight in memory."""

from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.core.traced import TracedModel
from exporter.trace import torch_export, torchscript
from exporter.trace.model import inverse_frequencies, llama_config
from exporter.trace.slices import cut, stamp

TRACERS = {"torch-export": torch_export.export_whole, "torchscript": torchscript.export_whole}
STAMPED_FROM = 2


def trace(config: ModelConfig, tracer: str = "torch-export") -> TracedModel:
    """Trace two layers, check that they are alike, and stamp the others; all layers share one structure."""
    return stamp(_trace_layers(config, tracer, min(STAMPED_FROM, config.num_layers)), config)


def trace_full(config: ModelConfig, tracer: str = "torch-export") -> TracedModel:
    """Trace every layer; each keeps its own structure. Slow in proportion to depth: for tests and doubts."""
    return _trace_layers(config, tracer, config.num_layers)


def _trace_layers(config: ModelConfig, tracer: str, layers: int) -> TracedModel:
    if tracer not in TRACERS:
        raise InputError("usage.tracer", f"unknown tracer {tracer!r}", f"choose one of {', '.join(TRACERS)}")
    whole = TRACERS[tracer](config, layers)
    return cut(whole, config, layers, inverse_frequencies(llama_config(config, layers)))
