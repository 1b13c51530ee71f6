"""Packing integer codes: four consecutive columns of a row make one 32-bit word, and words are what moves."""

from typing import TYPE_CHECKING

import numpy as np

from exporter.core.errors import UnsupportedError
from exporter.core.weights import QuantizedRows
from targets.tvm.packing_scales import exponents, row_factors, used_scales

if TYPE_CHECKING:
    from targets.tvm.packing import Layout

LARGEST_SCALE = 65504.0


def pack_int(layout: "Layout", rows: QuantizedRows, wanted: int, out: np.ndarray, vectors: slice) -> None:
    """Quantized rows [n <= wanted, K] go into `vectors` (0..1) of out uint8 [blocks, block_bytes]; zeros behind."""
    lanes, blocks, groups = layout.lanes, len(out), layout.groups
    records = out[:, : layout.factors_at].reshape(blocks, groups, layout.record)
    words = _stored_words(layout, np.ascontiguousarray(rows.codes).view(np.uint32))
    codes = records[:, :, : layout.scales_at].view(np.uint32).reshape(blocks, groups, -1, 2, lanes)
    # [block, vector, lane, group, word] -> [block, group, word, vector, lane]
    source = _filled(words, wanted).reshape(blocks, -1, lanes, groups, codes.shape[2])
    codes[:, :, :, vectors] = source.transpose(0, 3, 4, 1, 2)
    found, factors = _stored_scales(layout, rows)
    scales = records[:, :, layout.scales_at : layout.zeros_at].view(found.dtype).reshape(blocks, groups, 2, lanes)
    scales[:, :, vectors] = _grouped(_repeated(found, groups), wanted, blocks, lanes)
    if rows.zero_points is not None:
        zeros = records[:, :, layout.zeros_at :].reshape(blocks, groups, 2, lanes)
        zeros[:, :, vectors] = _grouped(_repeated(rows.zero_points, groups), wanted, blocks, lanes)
    if factors is not None:
        pack_factors(layout, factors, wanted, out, vectors)


def pack_factors(layout: "Layout", factors: np.ndarray, wanted: int, out: np.ndarray, vectors: slice) -> None:
    """A float32 factor for each row [n <= wanted] goes to the end of its block."""
    ends = out[:, layout.factors_at :].view(np.float32).reshape(len(out), 2, layout.lanes)
    ends[:, vectors] = _filled(factors[:, None], wanted).reshape(len(out), -1, layout.lanes)


def _stored_scales(layout: "Layout", rows: QuantizedRows) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales as they are stored [n, G], and the factors of rows [n] where there are any."""
    if layout.scale_bytes == 2:
        return _half(rows.scales), None
    scales = used_scales(rows)
    return row_factors(scales) if layout.row_scaled else (exponents(scales), None)


def _repeated(values: np.ndarray, groups: int) -> np.ndarray:
    """[n, G] -> [n, groups]: a scale of a whole row is that of each record."""
    return values if values.shape[1] == groups else np.repeat(values, groups // values.shape[1], axis=1)


def _stored_words(layout: "Layout", words: np.ndarray) -> np.ndarray:
    """Codes as 32-bit words of four columns [n, K / 4] -> words as stored: [n, K * bits / 32]."""
    if layout.kind == "int8":
        # Adding or subtracting 128 flips a byte's top bit.
        return np.asarray(words ^ np.uint32(0x80808080)) if layout.zero % 256 == 128 else words
    if layout.kind == "int6":
        return _six_bit_words(words)
    low, high = words[:, 0::2], words[:, 1::2]
    if layout.kind == "int4" and layout.precision.symmetric:  # -8..7 -> 0..15
        low = (low ^ np.uint32(0x08080808)) & np.uint32(0x0F0F0F0F)
        high = (high ^ np.uint32(0x08080808)) & np.uint32(0x0F0F0F0F)
    return np.asarray(low | (high << np.uint32(4)))


def _six_bit_words(words: np.ndarray) -> np.ndarray:
    """Four words of codes -32..31 -> three: upper bits of all four, then nibbles of two and two. Codes become 0..63."""
    codes = (words & np.uint32(0x3F3F3F3F)) ^ np.uint32(0x20202020)
    first, second, third, fourth = (codes[:, number::4] for number in range(4))
    stored = np.empty((len(words), words.shape[1] // 4, 3), np.uint32)
    upper, nibbles = np.uint32(0x03030303), np.uint32(0x0F0F0F0F)
    top = [part >> np.uint32(4) & upper for part in (first, second, third, fourth)]
    stored[:, :, 0] = top[0] | top[1] << np.uint32(2) | top[2] << np.uint32(4) | top[3] << np.uint32(6)
    stored[:, :, 1] = first & nibbles | (second & nibbles) << np.uint32(4)
    stored[:, :, 2] = third & nibbles | (fourth & nibbles) << np.uint32(4)
    return stored.reshape(len(words), -1)


def _half(scales: np.ndarray) -> np.ndarray:
    largest = float(np.max(np.abs(scales), initial=0.0))
    if not largest <= LARGEST_SCALE:
        raise UnsupportedError(
            "tvm.scale_overflow",
            f"a weight scale of {largest:g} does not fit float16",
            "keep this matrix in a float precision, or use target onnxruntime",
        )
    return scales.astype(np.float16)


def _grouped(values: np.ndarray, wanted: int, blocks: int, lanes: int) -> np.ndarray:
    """[n, groups] -> [block, group, vector, lane]."""
    return _filled(values, wanted).reshape(blocks, -1, lanes, values.shape[1]).transpose(0, 3, 1, 2)


def _filled(values: np.ndarray, rows: int) -> np.ndarray:
    if len(values) == rows:
        return values
    return np.concatenate([values, np.zeros((rows - len(values), values.shape[1]), values.dtype)])
