"""What `trtllm-build` makes of float weights for W8A16 and W4A16, whose files hold floats.

It gives each row, of each shard where a matrix is cut along its columns, a scale max|w| / 2^(bits - 1), rounds halves
away from zero and keeps codes within their bits: `symmetric_quantize` in
cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp, called by `weight_only_quantize_dict` in
tensorrt_llm/models/convert_utils.py.
"""

import numpy as np

from exporter.core.canonical import CheckpointWeight
from exporter.core.recipe import CHANNEL, Precision
from exporter.core.weights import QuantizedRows
from targets.base import RowReader
from targets.tensorrt_llm.formats import legacy_algorithm

LOADER_BITS = {"W8A16": 8, "W4A16": 4}


def rounded_by_loader(values: np.ndarray, bits: int) -> QuantizedRows:
    """float32 weights [n, K] -> codes int8 [n, K], scales float32 [n, 1]."""
    half = 2.0 ** (bits - 1)
    scales = np.abs(values).max(axis=1, keepdims=True) * np.float32(1 / half)
    scales = np.where(scales == 0, np.float32(1), scales)
    quotients = values / scales
    codes = np.trunc(quotients + np.copysign(np.float32(0.5), quotients))
    codes = np.clip(codes, -half, half - 1).astype(np.int8)
    return QuantizedRows(codes, scales, None, Precision(f"int{bits}", CHANNEL))


def loaded_rows(rows: RowReader, weight: CheckpointWeight, start: int, stop: int, kind: str) -> QuantizedRows | None:
    """Rows [start, stop) of a weight as the engine has them that is compiled from its floats (`kind`: their type);
    None where the files hold codes. Matrices are taken as whole; a shard's columns have scales of their own."""
    bits = LOADER_BITS.get(legacy_algorithm(weight.precision) or "")
    if bits is None:
        return None
    floats = rows(CheckpointWeight(weight.sources, Precision(kind)), start, stop)
    assert isinstance(floats, np.ndarray)
    return rounded_by_loader(floats.astype(np.float32), bits)
