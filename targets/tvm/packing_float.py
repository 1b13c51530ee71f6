"""Packing what is multiplied as float32: blocks [K][2 * lanes], so that one vector holds a column of several rows."""

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from exporter.core.weights import QuantizedRows
from targets.tvm.packing_int import pack_factors
from targets.tvm.packing_scales import HALF_BITS

if TYPE_CHECKING:
    from targets.tvm.packing import Layout

STORAGE = {"fp32": "float32", "fp16": "float16", "bf16": "uint16"}
"""How the packed values of a float kind appear to kernels: bfloat16 travels as its bits."""

_CAST = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def pack_float(layout: "Layout", rows: np.ndarray, wanted: int, out: np.ndarray, vectors: slice) -> None:
    """Float rows [n <= wanted, K] go into `vectors` (0..1) of out uint8 [blocks, block_bytes]; zeros behind them."""
    values = np.ascontiguousarray(rows, dtype=_CAST[layout.kind])
    _transposed(layout, values.view(STORAGE[layout.kind]), wanted, out, vectors)


def pack_fp8(layout: "Layout", rows: QuantizedRows, wanted: int, out: np.ndarray, vectors: slice) -> None:
    """E4M3 codes and a factor for each row, which kernels multiply by what they read: codes / 2^8."""
    _transposed(layout, rows.codes, wanted, out[:, : layout.factors_at], vectors)
    pack_factors(layout, rows.scales[:, 0] * np.float32(HALF_BITS), wanted, out, vectors)


def _transposed(layout: "Layout", values: np.ndarray, wanted: int, out: np.ndarray, vectors: slice) -> None:
    width, lanes = layout.width, layout.lanes
    if len(values) < wanted:
        values = np.concatenate([values, np.zeros((wanted - len(values), width), values.dtype)])
    target = out.view(values.dtype).reshape(len(out), width, 2, lanes)[:, :, vectors]
    target[...] = values.reshape(len(out), -1, lanes, width).transpose(0, 3, 1, 2)
