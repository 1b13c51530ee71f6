"""Weights in a stream: the rows of a canonical weight, read from the checkpoint when they are asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.number_formats import decode_table
from exporter.core.recipe import Precision

CHUNK_ELEMENTS = 1 << 22
FP16_BLOCK = 1 << 15  # elements; a block stays in the first-level caches through its three steps
FP16_SIGN_AND_MAGNITUDE = -0x70000001  # 0x8FFFFFFF: drops the copies of the sign that the shift made


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [n, K] as codes, one a byte.

    codes [n, K]: int8 for symmetric integers (-32..31 for int6), uint8 for asymmetric ones; uint8 for fp8 (the E4M3
    byte), nf4 (level 0..15), nvfp4 and mxfp4 (E2M1 code 0..15). scales: float32 [n, groups], G = groups of a row
    (`Precision.groups`): what a decoded code is multiplied by, scales of scales multiplied out; one scale of a whole
    matrix is repeated on every row. zero_points: uint8 [n, G] if asymmetric, else None.
    value = (code - zero_point) * scale, or decode_table(kind)[code] * scale.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    precision: Precision

    def dequantize(self) -> np.ndarray:
        """float32 [n, K]."""
        rows, width = self.codes.shape
        codes = self._decoded().reshape(rows, self.scales.shape[1], -1)
        if self.zero_points is not None:
            codes -= self.zero_points[:, :, None].astype(np.float32)
        codes *= self.scales[:, :, None]
        return codes.reshape(rows, width)

    def _decoded(self) -> np.ndarray:
        """What the codes stand for before scales: float32 [n, K], a copy."""
        if self.precision.is_integer:
            return self.codes.astype(np.float32)
        decoded: np.ndarray = decode_table(self.precision.kind)[self.codes]
        return decoded


def weight_shape(checkpoint: Checkpoint, weight: CheckpointWeight) -> tuple[int, ...]:
    """Shape of the stacked weight: [N, K], or [N] for norms and biases."""
    shapes = [checkpoint.tensors[name].shape for name in weight.sources]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def read_weight_rows(checkpoint: Checkpoint, weight: CheckpointWeight, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the stacked weight as float32."""
    out = np.empty((stop - start, *weight_shape(checkpoint, weight)[1:]), np.float32)
    first = 0
    for name in weight.sources:
        rows = checkpoint.tensors[name].shape[0]
        low, high = max(start - first, 0), min(stop - first, rows)
        if low < high:
            _widen(checkpoint.read_rows(name, low, high), out[first + low - start : first + high - start])
        first += rows
    return out


def read_tensor_rows(checkpoint: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of one tensor of the checkpoint as float32."""
    return read_weight_rows(checkpoint, CheckpointWeight((name,)), start, stop)


def read_layer(checkpoint: Checkpoint, layer: int) -> dict[str, np.ndarray]:
    """All tensors of a decoder layer by their names in it (`mlp.up_proj.weight`), float32."""
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): read_tensor_rows(checkpoint, name, 0, shape[0])
        for name, shape in checkpoint.config.tensor_shapes.items()
        if name.startswith(prefix)
    }


def _widen(rows: np.ndarray, out: np.ndarray) -> None:
    """Copy float rows into a contiguous float32 array of the same shape, exactly."""
    if rows.dtype != np.float16:
        out[...] = rows
        return
    # numpy converts float16 element by element; moving the bits and rescaling the exponent is 2.4 times as fast.
    codes, floats = rows.view(np.int16).reshape(-1), out.reshape(-1)
    for begin in range(0, codes.size, FP16_BLOCK):
        part = floats[begin : begin + FP16_BLOCK]
        bits = part.view(np.int32)
        np.left_shift(codes[begin : begin + FP16_BLOCK], 13, out=bits, dtype=np.int32)
        bits &= np.int32(FP16_SIGN_AND_MAGNITUDE)
        part *= np.float32(2.0**112)


def row_chunks(shape: tuple[int, ...], elements: int = CHUNK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a shape with about `elements` elements each."""
    width = shape[1] if len(shape) > 1 else 1
    step = max(1, elements // width)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
