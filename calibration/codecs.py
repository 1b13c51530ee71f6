"""Packing of integer codes into bytes, as ONNX and ONNX Runtime store them.

ONNX INT4 and UINT4 tensors: two codes a byte, the earlier one in the low nibble (onnx.proto, TensorProto.raw_data);
signed codes in two's complement. com.microsoft MatMulNBits: unsigned codes [N, K / g, g * bits / 8] in the same order
within a group, the zero point 2^(bits - 1) unless given; zero points packed likewise along K / g, each row padded to
a whole byte. GatherBlockQuantized with uint8 data takes the same bytes as [N, K * bits / 8]. None of them has 6 bits:
codes of int6 take bytes of 8.
"""

import numpy as np

from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows


def container_bits(precision: Precision) -> int:
    """Bits that a stored code takes here."""
    return 4 if precision.bits == 4 else 8


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes [.., K], one a byte, signed or not -> uint8 [.., ceil(K / 2)]; an odd last byte has a zero high nibble."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], axis=-1)
    pairs = np.ascontiguousarray(codes).view("<u2")
    packed = pairs & np.uint16(0x000F)
    packed |= (pairs >> np.uint16(4)) & np.uint16(0x00F0)
    return packed.astype(np.uint8)


def unpack_nibbles(packed: np.ndarray, width: int, *, signed: bool) -> np.ndarray:
    """uint8 [.., ceil(width / 2)] -> int8 or uint8 codes [.., width]."""
    codes = np.empty((*packed.shape, 2), np.uint8)
    codes[..., 0], codes[..., 1] = packed & 0x0F, packed >> 4
    if signed:
        codes = (codes ^ 8) - np.uint8(8)
    flat = codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :width]
    return flat.view(np.int8) if signed else flat


def unsigned_codes(rows: QuantizedRows) -> np.ndarray:
    """uint8 [n, K]: signed codes shifted by the zero point that MatMulNBits assumes, half of what their bits hold."""
    if not rows.precision.symmetric:
        return rows.codes
    return rows.codes.view(np.uint8) + np.uint8(1 << (container_bits(rows.precision) - 1))


def to_matmul_nbits(rows: QuantizedRows) -> np.ndarray:
    """Input B of MatMulNBits for these rows: uint8 [n, K / g, g * bits / 8]."""
    codes = unsigned_codes(rows)
    packed = codes if container_bits(rows.precision) == 8 else pack_nibbles(codes)
    return packed.reshape(len(codes), rows.scales.shape[1], -1)


def from_matmul_nbits(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, K / g, g * bits / 8] -> unsigned codes uint8 [n, K]."""
    flat = packed.reshape(len(packed), -1)
    return flat if bits == 8 else unpack_nibbles(flat, 2 * flat.shape[1], signed=False)


def pack_zero_points(rows: QuantizedRows) -> np.ndarray | None:
    """Input zero_points of MatMulNBits: uint8 [n, ceil(K / g * bits / 8)]; None when the implicit one holds."""
    if rows.zero_points is None:
        return None
    return rows.zero_points if container_bits(rows.precision) == 8 else pack_nibbles(rows.zero_points)


def to_onnx_raw(rows: QuantizedRows) -> np.ndarray:
    """raw_data of a tensor INT4, UINT4, INT8 or UINT8 [n, K] as uint8 [n, K * bits / 8]; K is even for 4 bits."""
    return rows.codes.view(np.uint8) if container_bits(rows.precision) == 8 else pack_nibbles(rows.codes)
