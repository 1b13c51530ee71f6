"""Small graphs written as text, and two runtimes to run them on: ONNX Runtime without optimizer, ONNX's reference."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from exporter.core.canonical import Slice, Weight
from exporter.core.config import ModelConfig, parse_config
from exporter.passes.rule import Context
from tests.support.tiny import BASE

# fp32 rounding of two ways to compute one small formula: a few ulp of 6e-8, summed over tens of terms.
RELATIVE_L2 = 2e-6


def tiny_config(**changes: object) -> ModelConfig:
    return parse_config({"architectures": ["LlamaForCausalLM"], **BASE, **changes})


def context(**changes: object) -> Context:
    return Context(tiny_config(**changes), 32)


def parse(text: str) -> ir.Model:
    """A model of opset 24 from the graph's text, as onnx.parser reads it; constants stand before the nodes in <...>."""
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 24]>\n{text}')
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.shape, value.type = ir.Shape(value.const_value.shape), ir.TensorType(value.const_value.dtype)
    return model


def piece(model: ir.Model, kind: str = "layer", weights: dict[str, Weight] | None = None) -> Slice:
    return Slice(kind, 0 if kind == "layer" else None, model, weights or {})


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def run_ort(model: ir.Model, feeds: dict[str, np.ndarray], fetch: list[str] | None = None) -> dict[str, np.ndarray]:
    """Outputs, or the values in `fetch`, on ONNX Runtime with its optimizer off."""
    proto = ir.to_proto(model)
    names = [value.name for value in proto.graph.output]
    for name in set(fetch or []) - set(names):
        proto.graph.output.add().name = name
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = fetch or names
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(wanted, session.run(wanted, given), strict=True))


def run_reference(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs on ONNX's reference implementation."""
    proto = ir.to_proto(model)
    names = [value.name for value in proto.graph.output]
    given = {value.name: feeds[value.name] for value in proto.graph.input}
    return dict(zip(names, ReferenceEvaluator(proto).run(None, given), strict=True))


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """Error's norm over the norm; infinite for NaN or another shape."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], limit: float = RELATIVE_L2) -> None:
    assert found.keys() == expected.keys()
    errors = {name: relative_l2(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= limit, errors


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
