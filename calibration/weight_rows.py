"""The rows of canonical weights at their precision, read and quantized on several threads in bounded memory."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from threading import Lock
from typing import Protocol

import ml_dtypes
import numpy as np

from calibration.coverage import PACKS
from calibration.rtn import magnitude, quantize_rows, wants_tensor_amax
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import UnsupportedError
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows, read_weight_rows, row_chunks, weight_shape

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHUNK_ELEMENTS = 1 << 20
# Each thread holds about 10 MB, and more of them only wait for the interpreter lock.
MAX_THREADS = 4
# The first magnitudes that round to infinity: the largest finite value and half a unit in its last place.
OVERFLOW = {"fp16": 65520.0, "bf16": 2.0**128 * (1 - 2.0**-9)}
HALF_TYPES = {"fp16": np.dtype(np.float16), "bf16": BFLOAT16}

Rows = np.ndarray | QuantizedRows


class StoredWeights(Protocol):
    """Codes that an algorithm chose before, such as those of a file of quantization parameters."""

    def rows(self, tensor: str, precision: Precision, start: int, stop: int) -> QuantizedRows | None:
        """Rows [start, stop) of a checkpoint's tensor; None where there are none at this precision
        (`Precision.weight_only`): they are then rounded to nearest. Called on several threads."""
        ...


class WeightRows:
    """Reads a checkpoint's weights as the targets want them: the `RowReader` of `targets.base`.

    `stored` codes go before rounding to nearest.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None, stored: StoredWeights | None = None) -> None:
        self.checkpoint = checkpoint
        self.threads = min(threads or len(os.sched_getaffinity(0)), MAX_THREADS)
        self.stored = stored
        self._amax: dict[str, float] = {}
        self._amax_lock = Lock()

    def __call__(self, weight: CheckpointWeight, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the stacked weight: float32, bfloat16 or float16 arrays, or QuantizedRows.

        Raises InputError for NaN and Inf in the checkpoint, UnsupportedError for values that a half type cannot hold.
        """
        precision = weight.precision
        if precision.is_coded:
            apart = self.stored is not None or wants_tensor_amax(precision)
            return self._coded(weight, start, stop) if apart else self._rounded(weight, start, stop)
        values = self._stored_rows(weight, start, stop)
        if precision.kind == "fp32":
            return values.astype(np.float32, copy=False)
        return _to_half(values, weight)

    def _rounded(self, weight: CheckpointWeight, start: int, stop: int, amax: float | None = None) -> QuantizedRows:
        return quantize_rows(self._stored_rows(weight, start, stop), weight.precision, amax)

    def _coded(self, weight: CheckpointWeight, start: int, stop: int) -> QuantizedRows:
        """Each tensor of the stack by itself: it has codes of its own, or an absolute maximum of its own."""
        parts = [
            self._tensor_rows(name, weight.precision, low, high)
            for name, low, high in stacked_ranges(self.checkpoint, weight, start, stop)
        ]
        return joined_rows(parts) if parts else self._rounded(weight, start, start, 0.0)

    def _tensor_rows(self, name: str, precision: Precision, start: int, stop: int) -> QuantizedRows:
        found = self.stored.rows(name, precision.weight_only, start, stop) if self.stored is not None else None
        if found is not None:
            return replace(found, precision=precision)
        amax = self._shared_amax(name, precision) if wants_tensor_amax(precision) else None
        return self._rounded(CheckpointWeight((name,), precision), start, stop, amax)

    def _shared_amax(self, name: str, precision: Precision) -> float:
        """max|w| of all matrices that one scale serves."""
        return max(map(self._tensor_amax, sharing_scale(name, precision)))

    def _tensor_amax(self, name: str) -> float:
        """max|w| of a whole tensor: read once, by the first thread that asks."""
        with self._amax_lock:
            if name not in self._amax:
                chunks = row_chunks(self.checkpoint.tensors[name].shape, CHUNK_ELEMENTS)
                largest = (magnitude(self.checkpoint.read_rows(name, *chunk)) for chunk in chunks)
                self._amax[name] = max(largest, default=0.0)
            return self._amax[name]

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
        ranges = stacked_ranges(self.checkpoint, weight, start, stop)
        parts = [self.checkpoint.read_rows(name, low, high) for name, low, high in ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def sharing_scale(name: str, precision: Precision) -> tuple[str, ...]:
    """The matrices (`model.layers.0.self_attn.q_proj.weight`) whose maximum scales this one: in nvfp4 all with the same
    input, as engines that compute them in one product have one scale for it; in fp8 each has its own."""
    for pack in PACKS if precision.kind == "nvfp4" else ():
        for module in pack:
            prefix = name.removesuffix(f".{module}.weight")
            if prefix != name:
                return tuple(f"{prefix}.{each}.weight" for each in pack)
    return (name,)


def stacked_ranges(
    checkpoint: Checkpoint, weight: CheckpointWeight, start: int, stop: int
) -> Iterator[tuple[str, int, int]]:
    """Which rows of which tensors are the rows [start, stop) of a stacked weight: (name, start, stop) in order."""
    first = 0
    for name in weight.sources:
        rows = checkpoint.tensors[name].shape[0]
        low, high = max(start - first, 0), min(stop - first, rows)
        if low < high:
            yield name, low, high
        first += rows


def joined_rows(parts: list[QuantizedRows]) -> QuantizedRows:
    """Rows of one precision, one part under the other."""
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedRows(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zero_points) if zero_points else None,
        parts[0].precision,
    )


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
