"""Whether parameters fit a checkpoint's architecture, and whether their numbers are ones their format allows."""

from collections.abc import Mapping, Sequence

import numpy as np

from calibration.qparams_format import AMAX, HEAD_POINT, KV_AMAX, StoredCodes, damaged
from calibration.transforms import Transform, check_transforms, point_width, transformed_config
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.core.recipe import INTEGER_BITS, Precision
from exporter.core.safetensors_file import TensorInfo
from exporter.core.weights import QuantizedRows

E4M3_NAN = 0x7F
SIGNED_SCALES = ("int4", "int6", "int8")
"""Kinds whose symmetric codes reach further below zero than above: a negative scale turns them round."""


def check_fits(
    config: ModelConfig,
    transforms: Sequence[Transform],
    codes: Mapping[str, StoredCodes],
    tensors: Mapping[str, TensorInfo],
) -> None:
    """Every layer, matrix and width is one of the architecture, as the transforms leave it."""
    check_transforms(transforms, config)
    shapes = transformed_config(config, transforms).tensor_shapes
    for key, stored in codes.items():
        found = (stored.codes.shape[0], stored.width)
        if shapes.get(stored.tensor) != found:
            raise _other(key, found, shapes.get(stored.tensor))
    for name, info in tensors.items():
        if (width := _statistic_width(name, config)) is not None and info.shape != (width,):
            raise _other(name, info.shape, (width,) if width else None)


def _statistic_width(name: str, config: ModelConfig) -> int | None:
    """Numbers that a statistic must have; 0 where the layer is not there, None for what is no statistic."""
    if not (AMAX.fullmatch(name) or KV_AMAX.fullmatch(name)):
        return None
    if not name.startswith(HEAD_POINT) and int(name.split(".")[2]) >= config.num_layers:
        return 0
    if name.endswith(".clip"):
        return 1
    if KV_AMAX.fullmatch(name):
        return config.num_kv_heads * config.head_dim
    return point_width(config, name.removesuffix(".amax").split(".")[-1])


def check_scales(scales: np.ndarray, precision: Precision, tensor: str) -> None:
    """Finite and not zero; positive but for symmetric integers; powers of two for mxfp4."""
    signed = precision.kind in SIGNED_SCALES and precision.symmetric
    good = np.isfinite(scales) & ((scales != 0) if signed else (scales > 0))
    if precision.kind == "mxfp4":
        good &= np.frexp(scales)[0] == 0.5
    if not good.all():
        row, group = np.argwhere(~good)[0]
        why = f"{tensor} has the scale {scales[row, group]:g}, which {precision.describe()} does not allow"
        raise damaged("scale", why)


def check_codes(rows: QuantizedRows, tensor: str) -> None:
    """Codes and zero points within their bits; no NaN among those of fp8."""
    kind, codes = rows.precision.kind, rows.codes
    if kind == "int6" and codes.size and not -32 <= codes.min() <= codes.max() < 32:
        raise damaged("codes", f"{tensor} has codes beyond 6 bits")
    if kind == "fp8" and ((codes & np.uint8(0x7F)) == E4M3_NAN).any():
        raise damaged("codes", f"{tensor} has NaN among its codes")
    zeros = rows.zero_points
    if zeros is not None and zeros.size and zeros.max() >= 1 << INTEGER_BITS[kind]:
        raise damaged("codes", f"{tensor} has zero points beyond {INTEGER_BITS[kind]} bits")


def _other(name: str, found: tuple[int, ...], wanted: tuple[int, ...] | None) -> InputError:
    belongs = f"the model has {list(wanted)}" if wanted else "the model has nothing of that name"
    return InputError(
        "qparams.shape", f"{name} has shape {list(found)}, {belongs}", "the parameters belong to another checkpoint"
    )
