"""Packed matrices written value by value from the description of the format, to test kernels and packing against."""

import ml_dtypes
import numpy as np

from exporter.core.number_formats import NF4_LEVELS
from exporter.core.recipe import CHANNEL, Precision
from targets.tvm.isa import Isa

FACTOR = np.float32(2.0**-10)
"""Of the rows of random nvfp4 matrices: their scales are E4M3 numbers times this."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
TABLED = ("nf4", "nvfp4", "mxfp4")


def record_group(precision: Precision, width: int) -> int:
    """Columns of a record; a scale of a whole row is repeated in each."""
    group = precision.group_size or 0
    return max(size for size in (16, 32, 64, 128, 256) if width % size == 0) if group == CHANNEL else group


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


def pack_floats(
    isa: Isa, values: np.ndarray, interleaved: bool = False, factors: np.ndarray | None = None
) -> np.ndarray:
    """[N, K] -> blocks [block][K][2 * lanes], flat; with factors [N, 1], for fp8, each block ends with its rows'."""
    padded = np.concatenate([values, np.zeros((1, values.shape[1]), values.dtype)])
    blocks = block_rows(isa, len(values), interleaved)
    if factors is None:
        return np.stack([padded[block].T for block in blocks]).reshape(-1)
    # Kernels read 2^-8 of an E4M3 value.
    ends = np.append(factors[:, 0], 0).astype(np.float32) * 256
    parts = [padded[block].T.tobytes() + ends[block].tobytes() for block in blocks]
    return np.frombuffer(b"".join(parts), np.uint8)


def pack_records(
    isa: Isa,
    precision: Precision,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    interleaved: bool = False,
) -> np.ndarray:
    """Codes int32 [N, K], scales [N, G], zero points [N, G] -> the byte stream."""
    group, lanes, levels = record_group(precision, codes.shape[1]), isa.lanes, precision.kind in TABLED
    repeats = codes.shape[1] // group // scales.shape[1]
    scales, zeros = np.repeat(scales, repeats, axis=1), None if zeros is None else np.repeat(zeros, repeats, axis=1)
    if levels:
        stored = codes
    elif precision.kind == "int4":
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
            if levels or precision.kind == "int4":
                chunks = part.reshape(2 * lanes, group // 8, 2, 4)
                words = chunks[:, :, 0] | chunks[:, :, 1] << 4
            elif precision.kind == "int6":
                words = six_bit_words(part)
            else:
                words = part.reshape(2 * lanes, group // 4, 4)
            stream += (words & 255).astype(np.uint8).transpose(1, 0, 2).tobytes()
            stream += scale_bytes(precision, np.array([scales[row, g] if row >= 0 else 0 for row in block]))
            if zeros is not None:
                stream += bytes(int(zeros[row, g]) if row >= 0 else 0 for row in block)
        if precision.kind == "nvfp4":
            # E4M3 read as float16 is 2^8 smaller, whole numbers are twice the values.
            stream += np.array([FACTOR * 128 if row >= 0 else 0 for row in block], np.float32).tobytes()
    return np.frombuffer(bytes(stream), np.uint8)


def scale_bytes(precision: Precision, scales: np.ndarray) -> bytes:
    """The scales of a record: float16, E4M3 of nvfp4, E8M0 of half a scale for mxfp4."""
    if precision.kind == "nvfp4":
        return (scales / FACTOR).astype(ml_dtypes.float8_e4m3fn).tobytes()
    if precision.kind == "mxfp4":
        return bytes(0 if scale == 0 else int(np.log2(scale)) + 126 for scale in scales)
    return scales.astype(np.float16).tobytes()


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
    """Codes int32 [N, K] over their whole range, scales float32 [N, G], zero points int32 [N, G] or None."""
    random = np.random.default_rng(rows * width + precision.bits)
    levels = 1 << precision.bits
    codes = random.integers(0, levels, (rows, width)).astype(np.int32)
    groups = precision.groups(width)
    if precision.kind == "nvfp4":
        bytes_ = random.integers(1, 127, (rows, groups)).astype(np.uint8)
        return codes, bytes_.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * FACTOR, None
    if precision.kind == "mxfp4":
        return codes, np.exp2(random.integers(-12, 3, (rows, groups))).astype(np.float32), None
    scales = random.uniform(0.001, 0.02, (rows, groups)).astype(np.float16).astype(np.float32)
    if precision.kind == "nf4":
        return codes, scales, None
    if precision.symmetric:
        return codes - levels // 2, scales, None
    return codes, scales, random.integers(0, levels, (rows, groups)).astype(np.int32)


def decoded(precision: Precision, codes: np.ndarray) -> np.ndarray:
    """What codes stand for before zero points and scales."""
    if precision.kind not in TABLED:
        return codes
    if precision.kind == "nf4":
        return np.array(NF4_LEVELS, np.float32)[codes]
    return np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])


def dequantized(precision: Precision, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """float32 [N, K]."""
    groups = decoded(precision, codes).reshape(*scales.shape, -1)
    if zeros is not None:
        groups = groups - zeros[..., None]
    return (groups.astype(np.float32) * scales.astype(np.float32)[..., None]).reshape(codes.shape)


def bfloat_bits(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values: bfloat16 by truncation."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
