"""The scale of a group of integers that minimises its error in a metric.

For each step codes, then the scale that fits them best, codes for that scale and their best scale again (Lloyd 1982):
with levels q of weights w it is (w . M q) / (q . M q), and takes (w . M q)^2 / (q . M q) off the error w . M w.
Groups of zeros get 1.
"""

from collections.abc import Callable

import torch

from exporter.core.recipe import Precision

Metric = Callable[[torch.Tensor], torch.Tensor]
"""M q for groups q [G, n, g]: each group's weights times a diagonal or a block of a Hessian."""
TINY = 1e-30


def search_symmetric(
    values: torch.Tensor, precision: Precision, metric: Metric, steps: tuple[float, ...]
) -> torch.Tensor:
    """Groups [G, n, g] -> signed scales [G, n]; a step is the code below zero that the largest weight is mapped to."""
    half = 2.0 ** (precision.bits - 1)
    unit = -values.gather(-1, values.abs().argmax(-1, keepdim=True))
    unit = torch.where(unit == 0, 1, unit)
    relative = values / unit
    best, scale = torch.zeros_like(unit), torch.ones_like(unit)
    for step in steps:
        fitted = torch.full_like(unit, 1 / step)
        for _ in range(2):
            levels = (relative / fitted).round_().clamp_(-half, half - 1)
            fitted, gain = _fit(relative, levels, metric, fitted)
        better = gain > best
        scale, best = torch.where(better, fitted, scale), torch.where(better, gain, best)
    return (scale * unit).squeeze(-1)


def search_asymmetric(
    values: torch.Tensor, precision: Precision, metric: Metric, steps: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups [G, n, g] -> scales [G, n] and zero points [G, n]; twice a step is how many codes the range spans."""
    top = 2.0**precision.bits - 1
    low = values.amin(-1, keepdim=True).clamp_max_(0)
    unit = values.amax(-1, keepdim=True).clamp_min_(0) - low
    unit = torch.where(unit == 0, 1, unit)
    relative, low = values / unit, low / unit
    best, scale, zero_point = torch.zeros_like(unit), torch.ones_like(unit), torch.zeros_like(unit)
    for step in steps:
        span = 2 * step - 1
        zero = (-low * span - (span - top) / 2).round_().clamp_(0, top)
        fitted = torch.full_like(unit, 1 / span)
        for _ in range(2):
            levels = (relative / fitted + zero).round_().clamp_(0, top).sub_(zero)
            fitted, gain = _fit(relative, levels, metric, fitted)
        better = gain > best
        scale, best = torch.where(better, fitted, scale), torch.where(better, gain, best)
        zero_point = torch.where(better, zero, zero_point)
    return (scale * unit).squeeze(-1), zero_point.squeeze(-1)


def _fit(
    weights: torch.Tensor, levels: torch.Tensor, metric: Metric, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale of levels, or the one `before` where none is positive, and what it takes off the error."""
    weighted = metric(levels)
    product = (weighted * weights).sum(-1, keepdim=True)
    norm = (weighted * levels).sum(-1, keepdim=True)
    fitted = product / norm.clamp_min(TINY)
    usable = (norm > TINY) & (fitted > 0)
    return torch.where(usable, fitted, before), torch.where(usable, product * fitted, 0)
