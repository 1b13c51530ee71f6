"""Rows of a matrix as a TensorRT-LLM checkpoint stores them: bytes, and the scales of rows or groups beside them."""

from dataclasses import dataclass

import numpy as np

from calibration.float_codecs import encode_e4m3
from calibration.positive_scales import positive_scales
from exporter.core.canonical import CheckpointWeight
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from targets.base import BuildSource
from targets.tensorrt_llm.packing import pack_row_pairs
from targets.tensorrt_llm.trtllm_config import FP8, MODULES, Algorithm, algorithm_of, module_precision

PACKS_WITH_ONE_SCALE = (("attention.qkv",), ("mlp.fc", "mlp.gate"))
"""Modules whose E4M3 weights share a scale, as modelopt has it: q, k and v are one matrix, and `fuse_gate_mlp` makes
one of fc and gate (tensorrt_llm/models/modeling_utils.py)."""


@dataclass(frozen=True)
class Encoded:
    """Some rows: `block` as stored, [n, K], or [n / 2, K] for int4; `scales` float32 [n, G] or None; `whole`: the one
    scale of E4M3 weights; `largest`: max|w| of what int4 codes stand for."""

    block: np.ndarray
    scales: np.ndarray | None = None
    whole: np.float32 | None = None
    largest: float = 0.0


@dataclass(frozen=True)
class Matrix:
    """One of the checkpoint's matrices: `name` like `model.layers.0.mlp.up_proj.weight`. `shared` is the scale of
    E4M3 weights that several matrices have together; None: its own."""

    name: str
    precision: Precision
    algorithm: Algorithm
    shared: np.float32 | None = None

    def encode(self, source: BuildSource, float_kind: str, start: int, stop: int) -> Encoded:
        """Rows [start, stop); an even number of them from an even one on."""
        if self.algorithm.weights == "float":
            return Encoded(_floats(source, self.name, float_kind, start, stop))
        rows = source.rows(CheckpointWeight((self.name,), self.precision), start, stop)
        assert isinstance(rows, QuantizedRows)
        if self.algorithm == FP8:
            return self._with_one_scale(source, rows, start, stop)
        if self.algorithm.weights == "int4":
            rows = positive_scales(rows)
            return Encoded(pack_row_pairs(rows.codes).view(np.int8), rows.scales, largest=_largest(rows))
        return Encoded(rows.codes, rows.scales)

    def _with_one_scale(self, source: BuildSource, rows: QuantizedRows, start: int, stop: int) -> Encoded:
        """E4M3 bytes [n, K] for the shared scale: from the weights themselves, as modelopt does; where an algorithm
        chose the codes, from what those stand for."""
        own = np.float32(rows.scales[0, 0])
        if self.shared is None or own == self.shared:
            return Encoded(rows.codes, whole=own)
        chosen = "gptq" in source.recipe.algorithms
        values = rows.dequantize() if chosen else _floats(source, self.name, "fp32", start, stop)
        return Encoded(encode_e4m3(values / self.shared), whole=self.shared)


def _largest(rows: QuantizedRows) -> float:
    groups = rows.codes.reshape(*rows.scales.shape, -1).astype(np.int16)
    return float((np.abs(groups).max(axis=2) * rows.scales).max(initial=0))


def shared_scales(source: BuildSource, layer: int) -> dict[str, np.float32]:
    """By module of a layer: the scale that its E4M3 weights share with others. Reads those matrices once."""
    shared: dict[str, np.float32] = {}
    for modules in PACKS_WITH_ONE_SCALE:
        precision = module_precision(source.recipe, layer, modules[0])
        if algorithm_of(precision) == FP8:
            names = [f"model.layers.{layer}.{name}.weight" for module in modules for name in MODULES[module]]
            shared |= dict.fromkeys(modules, max(_tensor_scale(source, name, precision) for name in names))
    return shared


def _tensor_scale(source: BuildSource, name: str, precision: Precision) -> np.float32:
    """The one scale of a matrix in fp8."""
    rows = source.rows(CheckpointWeight((name,), precision), 0, 1)
    assert isinstance(rows, QuantizedRows)
    return np.float32(rows.scales[0, 0])


def _floats(source: BuildSource, name: str, kind: str, start: int, stop: int) -> np.ndarray:
    values = source.rows(CheckpointWeight((name,), Precision(kind)), start, stop)
    assert isinstance(values, np.ndarray)
    return values
