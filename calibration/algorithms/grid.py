"""The values that a weight may take once its scales are known, and the search for scales that suit a Hessian.

Everything here is transposed, [K, n]: one input channel of all rows lies together, as the algorithms walk along K.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from calibration.algorithms.scale_search import Metric, search_asymmetric, search_symmetric
from calibration.float_codecs import encode_e2m1, encode_e4m3, encode_nf4
from calibration.half_scales import as_half
from calibration.rtn import quantize_rows
from exporter.core.number_formats import decode_table
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows

# The code that the largest weight of a group is mapped to before clipping to -8..7, as in calibration.rtn.
STEPS = {4: (7.0, 7.5, 8.0, 8.6, 9.3), 6: (31.0, 31.5, 32.0, 33.0)}
LONG_GROUP = 256
CLIPS = range(-3, 10)
"""Twentieths of the largest weight that are cut off; below zero: codes left over."""
BLOCK_ELEMENTS = 1 << 19
ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fp8": encode_e4m3,
    "nf4": encode_nf4,
    "nvfp4": encode_e2m1,
    "mxfp4": encode_e2m1,
}


@dataclass(frozen=True)
class Grid:
    """Scales [G, n], and zero points [G, n] of asymmetric integers, of rows whose K channels stand in G groups.

    What a code stands for before its scale is called a level: an integer less its zero point, or a small float.
    """

    precision: Precision
    group: int
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    @staticmethod
    def nearest(values: np.ndarray, precision: Precision, tensor_amax: float | None = None) -> "Grid":
        """The scales of rounding to nearest of rows [n, K]."""
        return Grid.of(quantize_rows(values, precision, tensor_amax))

    @staticmethod
    def of(rows: QuantizedRows) -> "Grid":
        """The scales of rows that are quantized already."""
        scales = torch.from_numpy(np.ascontiguousarray(rows.scales.T))
        zeros = rows.zero_points
        zero_points = None if zeros is None else torch.from_numpy(np.ascontiguousarray(zeros.T).astype(np.float32))
        return Grid(rows.precision, rows.precision.group_of(rows.codes.shape[1]), scales, zero_points)

    @property
    def free_scales(self) -> bool:
        """Whether a scale may be any float: those of fp8 are fixed by abs-max, those of nvfp4 and mxfp4 are coded."""
        return self.precision.is_integer or self.precision.kind == "nf4"

    def rounder(self) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """(weights [..., n] in units of their scale, group) -> nearest levels."""
        if not self.precision.is_integer:
            return _table_rounder(self.precision.kind)
        half = 2.0 ** (self.precision.bits - 1)
        if self.zero_points is None:
            return lambda weights, group: weights.round().clamp_(-half, half - 1)
        low = -self.zero_points
        high = low + (2 * half - 1)
        return lambda weights, group: torch.minimum(torch.maximum(weights.round(), low[group]), high[group])

    def round(self, values: np.ndarray) -> QuantizedRows:
        """Rows [n, K] rounded to nearest."""
        weights = torch.from_numpy(np.ascontiguousarray(values.T)).view(len(self.scales), self.group, -1)
        relative, rounded = weights / self.scales[:, None], self.rounder()
        return self.rows(torch.cat([rounded(block, group) for group, block in enumerate(relative)]))

    def rows(self, levels: torch.Tensor) -> QuantizedRows:
        """Levels [K, n] as stored rows [n, K]."""
        scales = np.ascontiguousarray(self.scales.numpy().T)
        if not self.precision.is_integer:
            codes = ENCODERS[self.precision.kind](np.ascontiguousarray(levels.numpy().T))
            return QuantizedRows(codes, scales, None, self.precision)
        if self.zero_points is None:
            signed = levels.T.to(torch.int8).contiguous().numpy()
            return QuantizedRows(signed, scales, None, self.precision)
        stored = levels.view(len(self.scales), self.group, -1) + self.zero_points[:, None]
        unsigned = stored.view(levels.shape).T.to(torch.uint8).contiguous().numpy()
        zeros = np.ascontiguousarray(self.zero_points.numpy().T.astype(np.uint8))
        return QuantizedRows(unsigned, scales, zeros, self.precision)


def _table_rounder(kind: str) -> Callable[[torch.Tensor, int], torch.Tensor]:
    table = decode_table(kind)
    levels = torch.from_numpy(np.unique(table[np.isfinite(table)]))
    middles = (levels[1:] + levels[:-1]) / 2
    return lambda weights, group: levels[torch.bucketize(weights, middles)]


def weighted_grid(
    values: np.ndarray, precision: Precision, weight: np.ndarray, tensor_amax: float | None = None
) -> Grid:
    """Scales for rows [n, K] that minimise the squared error with a `weight` [K] for each channel.

    Integers of 4 and 6 bits; others get the scales of rounding to nearest.
    """
    if precision.bits not in STEPS or not precision.is_integer:
        return Grid.nearest(values, precision, tensor_amax)
    metric = _diagonal_metric(weight, precision.group_of(len(weight)))
    return searched_grid(values, precision, metric, STEPS[precision.bits])


def clipped_grid(values: np.ndarray, precision: Precision, hessian: np.ndarray) -> Grid:
    """Scales for rows [n, K] of integers that minimise the error of each group alone under its block of the Hessian;
    under its diagonal where groups are longer than LONG_GROUP."""
    group = precision.group_of(len(hessian))
    top = 2.0 ** (precision.bits - 1)
    metric = _diagonal_metric(hessian.diagonal().copy(), group) if group > LONG_GROUP else _block_metric(hessian, group)
    return searched_grid(values, precision, metric, tuple(top / (1 - clip / 20) for clip in CLIPS))


def searched_grid(values: np.ndarray, precision: Precision, metric: Metric, steps: tuple[float, ...]) -> Grid:
    """Scales, and zero points, of integers of least error e . metric(e) of each group's error e, for rows [n, K]."""
    rows, width = values.shape
    group = precision.group_of(width)
    shape = (width // group, rows)
    scales = torch.empty(shape)
    zero_points = None if precision.symmetric else torch.empty(shape)
    count = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, count):
        part = slice(start, min(start + count, rows))
        block = torch.from_numpy(values[part]).view(-1, width // group, group).transpose(0, 1)
        if zero_points is None:
            scales[:, part] = search_symmetric(block, precision, metric, steps)
        else:
            scales[:, part], zero_points[:, part] = search_asymmetric(block, precision, metric, steps)
    return Grid(precision, group, torch.from_numpy(as_half(scales.numpy())), zero_points)


def _block_metric(hessian: np.ndarray, group: int) -> Metric:
    starts = range(0, len(hessian), group)
    blocks = torch.from_numpy(np.stack([hessian[at : at + group, at : at + group] for at in starts]))
    diagonals = blocks.diagonal(dim1=1, dim2=2)
    diagonals.copy_(_never_silent(diagonals))
    blocks /= diagonals.amax(-1)[:, None, None]
    return lambda codes: codes @ blocks


def _diagonal_metric(weight: np.ndarray, group: int) -> Metric:
    weights = _never_silent(torch.from_numpy(weight).view(-1, group))[:, None]
    weights = weights / weights.amax(-1, keepdim=True)
    return lambda codes: codes * weights


def _never_silent(weights: torch.Tensor) -> torch.Tensor:
    """[G, g] with a hundredth of the group's mean added: channels that the text left silent speak on another."""
    mean = weights.mean(-1, keepdim=True)
    return weights + torch.where(mean > 0, mean / 100, 1)
