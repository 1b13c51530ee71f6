"""Coordinate descent on codes and scales together, under the whole Hessian.

For errors E = W - S Q of rows, the loss is tr(E H ET). With all else fixed, the best scale of a group of levels q moves
by (q H e) / (q H q), and the best value of one weight is its present one plus (H e)_k / H_kk, rounded (QuantEase,
Behdin et al. 2023, arXiv:2309.01885, and its closed form of scales). Neither step ever raises the loss: a scale rounded
to float16 is the float16 value nearest to the least of a parabola.
"""

import torch

from calibration.algorithms.grid import Grid
from calibration.half_scales import as_half

BLOCK, LEAF = 128, 16
"""Channels whose changes reach all others, and each other within a block, in one product."""


def descend(
    errors: torch.Tensor, levels: torch.Tensor, grid: Grid, hessian: torch.Tensor, extra: torch.Tensor, sweeps: int
) -> tuple[Grid, torch.Tensor]:
    """Improve levels [K, n] with errors [K, n] (both overwritten); hessian [K, K] + diag(extra [K]).

    A block of channels at a time is worked on with the gradient H E of the block alone; what it changed reaches the
    gradient of all others in one product.
    """
    diagonal = hessian.diagonal() + extra
    gradient = hessian @ errors + extra[:, None] * errors
    scales = grid.scales.clone()
    width, size = len(levels), grid.group
    grid = Grid(grid.precision, size, scales, grid.zero_points)
    block = max(size, BLOCK // size * size) if size <= 2 * BLOCK else BLOCK
    for _ in range(sweeps):
        if grid.free_scales and size > block:
            _refit_long(errors, levels, scales, gradient, hessian, extra, size)
        for start in range(0, width, block):
            part = slice(start, min(start + block, width))
            near = hessian[part, part] + extra[part].diag()
            before = errors[part].clone()
            local = gradient[part].clone()
            if grid.free_scales and size <= block:
                _refit(errors[part], levels[part], scales[start // size : part.stop // size], local, near)
            _descend_block(errors[part], levels[part], local, near, diagonal[part], grid, start)
            change = errors[part] - before
            gradient.addmm_(hessian[:, part], change)
            gradient[part] += extra[part, None] * change
    return grid, levels


def _refit(
    errors: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, gradient: torch.Tensor, near: torch.Tensor
) -> None:
    """Best scales [g, n] of whole groups that lie in a block of channels; the block's errors and gradient follow."""
    size = len(levels) // len(scales)
    for group in range(len(scales)):
        part = slice(group * size, (group + 1) * size)
        codes = levels[part]
        curvature = (codes * (near[part, part] @ codes)).sum(0)
        change = _moved(scales[group], (codes * gradient[part]).sum(0), curvature)
        errors[part] -= codes * change
        gradient -= near[:, part] @ (codes * change)


def _refit_long(
    errors: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    extra: torch.Tensor,
    size: int,
) -> None:
    """The same for groups longer than a block."""
    for group in range(len(scales)):
        part = slice(group * size, (group + 1) * size)
        codes = levels[part]
        product = hessian[:, part] @ codes
        product[part] += extra[part, None] * codes
        change = _moved(scales[group], (codes * gradient[part]).sum(0), (codes * product[part]).sum(0))
        errors[part] -= codes * change
        gradient -= product * change


def _moved(scale: torch.Tensor, slope: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """Move scales [n] to the least of their parabola, in place; by how much they moved."""
    wanted = scale + torch.where(curvature > 0, slope / curvature.clamp_min(1e-30), 0)
    stored = torch.from_numpy(as_half(wanted.numpy()))
    stored = torch.where((stored != 0) & torch.isfinite(stored), stored, scale)
    change = stored - scale
    scale.copy_(stored)
    return change


def _descend_block(
    errors: torch.Tensor,
    levels: torch.Tensor,
    gradient: torch.Tensor,
    near: torch.Tensor,
    diagonal: torch.Tensor,
    grid: Grid,
    start: int,
) -> None:
    """One sweep over the channels of a block that begins at channel `start`, by the same scheme in leaves."""
    rounded = grid.rounder()
    for first in range(0, len(levels), LEAF):
        leaf = slice(first, first + LEAF)
        before, local, mutual = errors[leaf].clone(), gradient[leaf].clone(), near[leaf, leaf]
        for at in range(len(local)):
            group = (start + first + at) // grid.group
            scale, level = grid.scales[group], levels[first + at]
            best = rounded(level + local[at] / (diagonal[first + at] * scale), group)
            change = (level - best) * scale
            level.copy_(best)
            errors[first + at] += change
            local.addr_(mutual[:, at], change)
        gradient.addmm_(near[:, leaf], errors[leaf] - before)
