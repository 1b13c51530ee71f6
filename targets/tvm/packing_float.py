"""Packing float matrices: blocks [K][2 * lanes], so that one vector holds a column of several rows."""

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from targets.tvm.packing import Layout

STORAGE = {"fp32": "float32", "fp16": "float16", "bf16": "uint16"}
"""How the packed values of a float precision appear to kernels: bfloat16 travels as its bits."""

_CAST = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def pack_float(layout: "Layout", rows: np.ndarray, wanted: int, out: np.ndarray, vectors: slice) -> None:
    """Float rows [n <= wanted, K] go into `vectors` (0..1) of out uint8 [blocks, K, record]; zeros behind them."""
    width, lanes = layout.width, layout.lanes
    values = np.ascontiguousarray(rows, dtype=_CAST[layout.precision.kind]).view(STORAGE[layout.precision.kind])
    if len(values) < wanted:
        values = np.concatenate([values, np.zeros((wanted - len(values), width), values.dtype)])
    target = out.view(values.dtype).reshape(len(out), width, 2, lanes)[:, :, vectors]
    target[...] = values.reshape(len(out), -1, lanes, width).transpose(0, 3, 1, 2)
