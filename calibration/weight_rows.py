"""The rows of canonical weights at their precision, read and quantized on several threads in bounded memory."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import ml_dtypes
import numpy as np

from calibration.rtn import quantize_rows
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import UnsupportedError
from exporter.core.weights import QuantizedRows, read_weight_rows, row_chunks, weight_shape

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHUNK_ELEMENTS = 1 << 20
# Each thread holds about 10 MB, and more of them only wait for the interpreter lock.
MAX_THREADS = 4
# The first magnitudes that round to infinity: the largest finite value and half a unit in its last place.
OVERFLOW = {"fp16": 65520.0, "bf16": 2.0**128 * (1 - 2.0**-9)}
HALF_TYPES = {"fp16": np.dtype(np.float16), "bf16": BFLOAT16}

Rows = np.ndarray | QuantizedRows


class WeightRows:
    """Reads a checkpoint's weights as the targets want them: the `RowReader` of `targets.base`."""

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        self.checkpoint = checkpoint
        self.threads = min(threads or len(os.sched_getaffinity(0)), MAX_THREADS)

    def __call__(self, weight: CheckpointWeight, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the stacked weight: float32, bfloat16 or float16 arrays, or QuantizedRows.

        Raises InputError for NaN and Inf in the checkpoint, UnsupportedError for values that a half type cannot hold.
        """
        values = self._stored_rows(weight, start, stop)
        if weight.precision.is_integer:
            return quantize_rows(values, weight.precision)
        if weight.precision.kind == "fp32":
            return values.astype(np.float32, copy=False)
        return _to_half(values, weight)

    def iterate_rows(self, weight: CheckpointWeight) -> Iterator[tuple[int, int, Rows]]:
        """All rows in order, as (start, stop, rows): prepared ahead on other threads, a few chunks at a time."""
        chunks = row_chunks(weight_shape(self.checkpoint, weight), CHUNK_ELEMENTS)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="weight-rows") as pool:
            pending: deque[tuple[int, int, Future[Rows]]] = deque()
            try:
                for start, stop in islice(chunks, self.threads + 1):
                    pending.append((start, stop, pool.submit(self, weight, start, stop)))
                while pending:
                    start, stop, future = pending.popleft()
                    rows = future.result()
                    for following in islice(chunks, 1):
                        pending.append((*following, pool.submit(self, weight, *following)))
                    yield start, stop, rows
            finally:
                for _, _, future in pending:
                    future.cancel()

    def _stored_rows(self, weight: CheckpointWeight, start: int, stop: int) -> np.ndarray:
        """bfloat16 where all sources are (half the memory traffic, and exact), else float32."""
        tensors = self.checkpoint.tensors
        if start >= stop or any(tensors[name].dtype != BFLOAT16 for name in weight.sources):
            return read_weight_rows(self.checkpoint, weight, start, stop)
        parts, first = [], 0
        for name in weight.sources:
            rows = tensors[name].shape[0]
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                parts.append(self.checkpoint.read_rows(name, low, high))
            first += rows
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _to_half(values: np.ndarray, weight: CheckpointWeight) -> np.ndarray:
    """Round to nearest even in bfloat16 or float16; refuses what would become infinite."""
    kind = weight.precision.kind
    if values.dtype == HALF_TYPES[kind]:
        return values
    wide = values.astype(np.float32, copy=False)
    largest = max(float(wide.max()), -float(wide.min())) if wide.size else 0.0
    if largest >= OVERFLOW[kind]:
        raise UnsupportedError(
            "recipe.overflow",
            f"{', '.join(weight.sources)} holds {largest:.6g}, which {kind} cannot represent",
            "use the recipe bf16 or fp32",
        )
    return wide.astype(HALF_TYPES[kind])
