"""GPTQ: rounding one input channel after another, the error of each carried into those still to come.

Frantar et al. 2022, arXiv:2210.17323. Its solution is that of LDLQ (Chee et al. 2023, arXiv:2307.13304, theorem 6):
with H = (U + I) D (U + I)T, U strictly upper triangular, column k of a row w becomes

    q_k = round(w_k + sum over i < k of (w_i - q_i) U_ik)

which is exactly what the paper's Cholesky factor of the inverse makes of it, without inverting anything. Columns come
in the order of falling diagonal (act-order); scales are found beforehand, so that codes stay in place (static groups).
What is beyond the paper, and what it is worth, stands in docs/algorithms.md: damping in proportion to each channel's
own diagonal, scales that minimise the error weighted by it, and calibration.algorithms.descent afterwards.
"""

from dataclasses import dataclass

import numpy as np
import torch

from calibration.algorithms.descent import descend
from calibration.algorithms.grid import Grid, weighted_grid
from exporter.core.errors import InputError
from exporter.core.recipe import AlgorithmOptions, Precision
from exporter.core.weights import QuantizedRows

LARGEST_DAMPING = 1e3
SWEEPS = 2
"""Rounds of coordinate descent after the pass."""
LEAF = 16
"""Channels whose errors are carried on one by one; more go in products of matrices."""


@dataclass(frozen=True)
class GptqFactor:
    """What every row of the matrices that share an input needs, float32.

    hessian [K, K] as given; extra [K] what damping adds to its diagonal; order [K] the channels in the order in which
    `feedback` [K, K] has them, the first to be rounded last; feedback is lower triangular with a diagonal of ones: row
    i holds what the error of channel order[i] adds to channels order[k], k < i. damping: as used, relative to the
    diagonal; dead: channels whose input is always 0.
    """

    hessian: np.ndarray
    extra: np.ndarray
    order: np.ndarray
    feedback: np.ndarray
    damping: float
    dead: int


def factor(hessian: np.ndarray, options: AlgorithmOptions) -> GptqFactor:
    """Factorise a Hessian [K, K] float32; its damping is doubled until that succeeds.

    Damping is a fraction of each channel's own diagonal, not of the mean: it stays the same under scales of the input,
    where a few loud channels would drown the others.
    """
    diagonal = np.ascontiguousarray(hessian.diagonal())
    if not np.isfinite(diagonal).all():
        raise InputError("calibration.hessian", "a Hessian with NaN or Inf", "look for them in the activations")
    alive = diagonal > 0
    typical = float(diagonal[alive].mean()) if alive.any() else 1.0
    order = np.argsort(diagonal, kind="stable") if options.act_order else np.arange(len(diagonal))[::-1]
    ordered = torch.from_numpy(hessian[np.ix_(order, order)])
    damping = options.damping
    while damping <= LARGEST_DAMPING:
        extra = np.where(alive, np.float32(damping) * diagonal, np.float32(typical)).astype(np.float32)
        ordered.diagonal().copy_(torch.from_numpy((diagonal + extra)[order]))
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not failed and torch.isfinite(lower.diagonal()).all():
            lower /= lower.diagonal().clone()
            return GptqFactor(hessian, extra, order, lower.numpy(), damping, int((~alive).sum()))
        del lower
        damping = 2 * damping or 1e-5
    raise InputError("calibration.hessian", "a Hessian that no damping makes definite", "look for NaN in activations")


def quantize(
    values: np.ndarray,
    precision: Precision,
    factor: GptqFactor,
    options: AlgorithmOptions,
    tensor_amax: float | None = None,
    sweeps: int = SWEEPS,
) -> QuantizedRows:
    """Quantize rows [n, K] float32. A row's result depends on no other row, but on `tensor_amax` (as in
    calibration.rtn.quantize_rows) where the precision wants it."""
    values = np.ascontiguousarray(values, np.float32)
    diagonal = factor.hessian.diagonal() + factor.extra
    grid = weighted_grid(values, precision, np.ascontiguousarray(diagonal), tensor_amax)
    return from_grid(values, grid, factor, options, sweeps)


def from_grid(
    values: np.ndarray, grid: Grid, factor: GptqFactor, options: AlgorithmOptions, sweeps: int = SWEEPS
) -> QuantizedRows:
    """The same with scales that are known already."""
    order = torch.from_numpy(np.ascontiguousarray(factor.order))
    weights = torch.from_numpy(values).T[order]
    errors, levels = torch.empty_like(weights), torch.empty_like(weights)
    feedback = torch.from_numpy(factor.feedback)
    for stop in range(len(order), 0, -options.block):
        start = max(0, stop - options.block)
        targets = weights[start:stop] + feedback[stop:, start:stop].T @ errors[stop:]
        _round_block(targets, weights, errors, levels, (start, stop), feedback, order // grid.group, grid)
    unordered = torch.argsort(order)
    levels, errors = levels[unordered], errors[unordered]
    del weights
    if sweeps:
        hessian, extra = torch.from_numpy(factor.hessian), torch.from_numpy(factor.extra)
        grid, levels = descend(errors, levels, grid, hessian, extra, sweeps)
    return grid.rows(levels)


def _round_block(
    targets: torch.Tensor,
    weights: torch.Tensor,
    errors: torch.Tensor,
    levels: torch.Tensor,
    block: tuple[int, int],
    feedback: torch.Tensor,
    groups: torch.Tensor,
    grid: Grid,
) -> None:
    """Channels of a block, last to first; `targets` are its weights with the feedback of all later channels.

    Halves down to LEAF channels: the later half's errors reach the earlier one in one product.
    """
    start, stop = block
    if stop - start > LEAF:
        middle = (start + stop) // 2
        near, far = targets[: middle - start], targets[middle - start :]
        _round_block(far, weights, errors, levels, (middle, stop), feedback, groups, grid)
        near.addmm_(feedback[middle:stop, start:middle].T, errors[middle:stop])
        _round_block(near, weights, errors, levels, (start, middle), feedback, groups, grid)
        return
    rounded = grid.rounder()
    for channel in range(stop - 1, start - 1, -1):
        group = int(groups[channel])
        scale = grid.scales[group]
        levels[channel] = rounded(targets[channel - start] / scale, group)
        torch.addcmul(weights[channel], levels[channel], scale, value=-1, out=errors[channel])
        targets[: channel - start].addr_(feedback[channel, start:channel], errors[channel])
