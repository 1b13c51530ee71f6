"""Codes, one a byte, as the bytes of quantized checkpoints."""

import numpy as np


def pack_row_pairs(codes: np.ndarray) -> np.ndarray:
    """int4 of ModelOpt: int8 codes -8..7 [2n, K] -> uint8 [n, K], two's complement, the even row in the low nibble.

    modelopt/torch/export/quant_utils.py, `pack_int4_in_uint8`."""
    nibbles = codes.view(np.uint8) & np.uint8(15)
    packed: np.ndarray = nibbles[0::2] | (nibbles[1::2] << np.uint8(4))
    return packed


def pack_columns(codes: np.ndarray) -> np.ndarray:
    """E2M1: uint8 codes 0..15 [n, K] -> uint8 [n, K / 2], the even column in the low nibble.

    modelopt `NVFP4QTensor` and compressed-tensors `pack_fp4_to_uint8` alike."""
    packed: np.ndarray = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return packed


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """compressed-tensors `pack_to_int32`: int8 codes [n, K] of 4 or 8 bits -> int32 [n, ceil(K bits / 32)].

    Codes are offset to unsigned (-8 becomes 0); the first of a word is its lowest; a row's last word is filled with 0.
    """
    per_word = 32 // bits
    rows, width = codes.shape
    unsigned = np.zeros((rows, -(-width // per_word) * per_word), np.uint8)
    unsigned[:, :width] = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4))
    words: np.ndarray = unsigned.view("<i4")
    return words
