"""How keys and values are stored: float32, or int8 with one scale each for all keys and all values of a layer.

GroupQueryAttention stores clip(rint(x / scale), -128, 127), halves to even, and multiplies codes by the scale again.
The scales are constants of the engine and come from calibration.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporter.core.config import ModelConfig
from exporter.core.errors import InputError, UnsupportedError
from targets.base import BuildSource
from targets.onnxruntime.engine_graph import Dimensions
from targets.onnxruntime.support import kv_cache_support

DTYPES = {"fp32": ir.DataType.FLOAT, "int8": ir.DataType.INT8}
Scales = Mapping[int, tuple[float, float]]


@dataclass(frozen=True)
class KvCache:
    """One kind of storage for all layers; `scales` of keys and values by layer for int8."""

    kind: str
    scales: Scales

    @property
    def dtype(self) -> ir.DataType:
        return DTYPES[self.kind]

    @property
    def type_name(self) -> str:
        """As signatures and ONNX Runtime spell it."""
        return "float32" if self.kind == "fp32" else self.kind

    def shape(self, config: ModelConfig) -> Dimensions:
        return ["batch_size", config.num_kv_heads, "cache_length", config.head_dim]


def kv_cache(source: BuildSource) -> KvCache:
    """The cache that a recipe asks for. Raises UnsupportedError for kinds without a kernel, InputError where the scales
    of a layer are missing."""
    kind, config = source.recipe.kv_cache, source.config
    support = kv_cache_support(kind, config.head_dim)
    if not support.usable:
        raise UnsupportedError("onnxruntime.kv_cache", support.why, support.remedy)
    if kind == "fp32":
        return KvCache(kind, {})
    scales = source.kv_scales or {}
    if missing := [str(layer) for layer in range(config.num_layers) if layer not in scales]:
        raise InputError(
            "kv_cache.scales",
            f"an {kind} KV cache needs scales from calibration, and layers {', '.join(missing)} have none",
            "give --calibration TEXT or --qparams FILE, or use --kv-cache fp32",
        )
    return KvCache(kind, scales)
