"""Packed matrices written value by value from the description of the format, to test kernels and packing against."""

import numpy as np

from exporter.core.recipe import Precision
from targets.tvm.isa import Isa


def block_rows(isa: Isa, rows: int, interleaved: bool) -> list[list[int]]:
    """The source rows of each block, in order of its 2 * lanes places; -1 where there is none."""
    lanes = isa.lanes
    if not interleaved:
        places = np.arange(-(-rows // (2 * lanes)) * 2 * lanes)
        return np.where(places < rows, places, -1).reshape(-1, 2 * lanes).tolist()
    half = rows // 2
    places = np.arange(-(-half // lanes) * lanes).reshape(-1, lanes)
    gate, up = np.where(places < half, places, -1), np.where(places < half, places + half, -1)
    return np.concatenate([gate, up], axis=1).tolist()


def pack_floats(isa: Isa, values: np.ndarray, interleaved: bool = False) -> np.ndarray:
    """[N, K] -> blocks [block][K][2 * lanes], flat."""
    padded = np.concatenate([values, np.zeros((1, values.shape[1]), values.dtype)])
    blocks = block_rows(isa, len(values), interleaved)
    return np.stack([padded[block].T for block in blocks]).reshape(-1)


def pack_records(
    isa: Isa,
    precision: Precision,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    interleaved: bool = False,
) -> np.ndarray:
    """Codes int32 [N, K], scales float16 [N, G], zero points [N, G] -> the byte stream."""
    group, lanes = precision.group_size, isa.lanes
    if precision.kind == "int4":
        stored = codes + (8 if precision.symmetric else 0)
    elif precision.kind == "int6":
        stored = codes + 32
    else:
        stored = codes + isa.int8_offset - (0 if precision.symmetric else 128)
    stream = bytearray()
    for block in block_rows(isa, len(codes), interleaved):
        for g in range(codes.shape[1] // group):
            part = np.zeros((2 * lanes, group), np.int64)
            for place, row in enumerate(block):
                if row >= 0:
                    part[place] = stored[row, g * group : (g + 1) * group]
            if precision.kind == "int4":
                chunks = part.reshape(2 * lanes, group // 8, 2, 4)
                words = chunks[:, :, 0] | chunks[:, :, 1] << 4
            elif precision.kind == "int6":
                words = six_bit_words(part)
            else:
                words = part.reshape(2 * lanes, group // 4, 4)
            stream += (words & 255).astype(np.uint8).transpose(1, 0, 2).tobytes()
            stream += np.array([scales[row, g] if row >= 0 else 0 for row in block], np.float16).tobytes()
            if zeros is not None:
                stream += bytes(int(zeros[row, g]) if row >= 0 else 0 for row in block)
    return np.frombuffer(bytes(stream), np.uint8)


def six_bit_words(codes: np.ndarray) -> np.ndarray:
    """Codes 0..63 [rows, group] -> [rows, 3 * group / 16, 4]: of 16 columns the upper bits, then their lower four."""
    rows, group = codes.shape
    stored = np.zeros((rows, group // 16, 3, 4), np.int64)
    for column in range(group):
        chunk, quad, byte = column // 16, column % 16 // 4, column % 4
        stored[:, chunk, 0, byte] |= (codes[:, column] >> 4) << 2 * quad
        stored[:, chunk, 1 + quad // 2, byte] |= (codes[:, column] & 15) << 4 * (quad % 2)
    return stored.reshape(rows, -1, 4)


def random_codes(precision: Precision, rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes int32 [N, K] over their whole range, scales float16 [N, G], zero points int32 [N, G] or None."""
    random = np.random.default_rng(rows * width + precision.bits)
    levels = 1 << precision.bits
    codes = random.integers(0, levels, (rows, width)).astype(np.int32)
    groups = width // precision.group_size
    scales = random.uniform(0.001, 0.02, (rows, groups)).astype(np.float16)
    if precision.symmetric:
        return codes - levels // 2, scales, None
    return codes, scales, random.integers(0, levels, (rows, groups)).astype(np.int32)


def dequantized(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """float32 [N, K]."""
    groups = codes.reshape(*scales.shape, -1)
    if zeros is not None:
        groups = groups - zeros[..., None]
    return (groups.astype(np.float32) * scales.astype(np.float32)[..., None]).reshape(codes.shape)


def bfloat_bits(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values: bfloat16 by truncation."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
