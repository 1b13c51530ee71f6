"""Activations as a precision rounds them, in float32: what an engine multiplies with."""

import numpy as np

from calibration.float_codecs import decode_e4m3, encode_e4m3
from exporter.core.number_formats import E4M3_MAX


def round_activations(inputs: np.ndarray, activations: str, amax: float) -> np.ndarray:
    """Inputs [T, K] rounded as one of exporter.core.recipe.ACTIVATIONS says, or as they are for the empty one.

    The scale is max|x| / 127 or 448, of each token or, with `tensor`, of `amax`.
    """
    if not activations:
        return inputs
    kind, granularity = activations.split("/")
    largest = np.abs(inputs).max(axis=1, keepdims=True) if granularity == "token" else np.full((1, 1), amax, np.float32)
    scale = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(127 if kind == "int8" else E4M3_MAX)
    codes = inputs / scale
    rounded: np.ndarray = np.clip(np.rint(codes), -128, 127) if kind == "int8" else decode_e4m3(encode_e4m3(codes))
    return np.asarray(rounded * scale)
