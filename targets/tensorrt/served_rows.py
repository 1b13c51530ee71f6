"""Rows as the engine's file holds them: what a simulation of the engine is made of."""

import numpy as np

from calibration.positive_scales import positive_scales
from exporter.core.canonical import CheckpointWeight
from exporter.core.weights import QuantizedRows
from targets.base import RowReader


def served_rows(rows: RowReader) -> RowReader:
    """The same with positive scales, which TensorRT documents for every DequantizeLinear (IDequantizeLayer: "All scale
    coefficients must have strictly positive values"). TensorRT-RTX 1.7's parser alone takes negative ones, for int4."""

    def served(weight: CheckpointWeight, start: int, stop: int) -> "np.ndarray | QuantizedRows":
        found = rows(weight, start, stop)
        return positive_scales(found) if isinstance(found, QuantizedRows) else found

    return served
