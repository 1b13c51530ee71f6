"""Rows as the files hold them, and servers compute with them: what a simulation of a server is made of."""

from dataclasses import replace

import ml_dtypes
import numpy as np

from calibration.positive_scales import positive_scales
from exporter.core.canonical import CheckpointWeight
from exporter.core.weights import QuantizedRows
from targets.base import RowReader
from targets.tensorrt_llm.formats import COMPRESSED, LEGACY, compressed_format
from targets.tensorrt_llm.loader_rounding import loaded_rows

FLOATS = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}


def served_rows(rows: RowReader, form: str, kind: str) -> RowReader:
    """The same with positive scales, and where the form stores them in 16 bits with those (`kind`: bf16 or fp16).

    TensorRT-LLM checkpoints: W8A16 and W4A16 are floats in the files, rounded when an engine is compiled.
    compressed-tensors: scales of groups lie in the type the model computes in, which is how vLLM and transformers hold
    them. ModelOpt's are float32 in the file; what TensorRT-LLM rounds them to when it loads is not simulated.
    """

    def served(weight: CheckpointWeight, start: int, stop: int) -> "np.ndarray | QuantizedRows":
        if form == LEGACY and (loaded := loaded_rows(rows, weight, start, stop, kind)) is not None:
            return loaded
        found = rows(weight, start, stop)
        if not isinstance(found, QuantizedRows):
            return found
        found = positive_scales(found)
        if form == COMPRESSED and compressed_format(found.precision) == "pack-quantized":
            return replace(found, scales=found.scales.astype(FLOATS[kind]).astype(np.float32))
        return found

    return served
