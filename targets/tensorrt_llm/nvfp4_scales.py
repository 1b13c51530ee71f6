"""The two factors of nvfp4 scales: an E4M3 number for each block of 16, and one float32 for the matrix."""

from collections.abc import Sequence

import numpy as np

from calibration.coded_floats import magnitude, nvfp4_matrix_scale
from calibration.float_codecs import decode_e4m3, encode_e4m3
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import UnsupportedError
from exporter.core.weights import row_chunks

NEIGHBOURS = 4
"""Units in the last place that the maximum of weights computed in another order may differ by."""


def matrix_scale(checkpoint: Checkpoint, names: Sequence[str]) -> np.float32:
    """max|w| / (6 * 448) of all these matrices together, as calibration.coded_floats has it. Reads them once."""
    amax = 0.0
    for name in names:
        for start, stop in row_chunks(checkpoint.tensors[name].shape):
            amax = max(amax, magnitude(checkpoint.read_rows(name, start, stop)))
    return nvfp4_matrix_scale(amax)


def block_codes(scales: np.ndarray, matrix: np.float32) -> np.ndarray | None:
    """Effective float32 scales -> uint8 E4M3 codes; None unless decoded codes times `matrix` give them back bit for
    bit."""
    codes = encode_e4m3(scales / matrix)
    exact = np.array_equal(decode_e4m3(codes) * matrix, scales)
    return codes if exact else None


def common_scale(scales: Sequence[np.ndarray], near: np.float32, names: Sequence[str]) -> np.float32:
    """The matrix scale, at most a few units in the last place from `near`, that all these scales are E4M3 multiples of.

    Raises UnsupportedError: consumers compute matrices with one input in one product, with one scale for them.
    """
    up = down = near
    candidates = [near]
    for _ in range(NEIGHBOURS):
        up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, np.float32(0))
        candidates += [up, down]
    for candidate in candidates:
        if all(block_codes(part, candidate) is not None for part in scales):
            return candidate
    raise UnsupportedError(
        "recipe.nvfp4_scale",
        f"the nvfp4 scales of {', '.join(names)} are not E4M3 multiples of one scale",
        "calibrate again: parameters of older versions gave each matrix a scale of its own",
    )
