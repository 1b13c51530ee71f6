"""Traced models for tests: each distinct graph is traced once a session, then copied."""

import json
from collections.abc import Callable
from functools import cache
from unittest.mock import patch

import onnx_ir as ir

from exporter.core.config import ModelConfig, parse_config
from exporter.core.traced import TracedModel
from exporter.trace import trace as tracing
from tests.support.tiny import BASE, SHAPES

EXPORTERS = dict(tracing.TRACERS)
# What the traced graph cannot depend on: tying is undone and the frequencies are an input of the traced module.
NO_STRUCTURE = ("eos_token_id", "tie_word_embeddings", "rope_parameters", "num_hidden_layers")


def tiny_config(shape: str = "gqa", **changes: object) -> ModelConfig:
    return parse_config({"architectures": ["LlamaForCausalLM"], **BASE, **SHAPES[shape], **changes})


def traced_model(config: ModelConfig, tracer: str, full: bool = False) -> TracedModel:
    """`trace(config, tracer)` or `trace_full`, with the tracer's own work remembered."""
    with patch.dict(tracing.TRACERS, {tracer: _remembered(tracer)}):
        return (tracing.trace_full if full else tracing.trace)(config, tracer)


def _remembered(tracer: str) -> Callable[[ModelConfig, int], ir.Model]:
    def export_whole(config: ModelConfig, layers: int) -> ir.Model:
        structural = {name: value for name, value in config.raw.items() if name not in NO_STRUCTURE}
        return _export(tracer, json.dumps(structural, sort_keys=True), layers).clone()

    return export_whole


@cache
def _export(tracer: str, raw: str, layers: int) -> ir.Model:
    config = parse_config({**json.loads(raw), "num_hidden_layers": layers})
    return EXPORTERS[tracer](config, layers)
