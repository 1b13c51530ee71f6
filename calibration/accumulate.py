"""Gathering InputStatistics of one matrix's input, batch after batch."""

import numpy as np
import torch

from calibration.statistics import InputStatistics
from exporter.core.errors import InputError

WIDE_SUMS = 512
"""Hessians up to this width are summed in float64, which costs little there."""
HESSIAN_PANELS = 8


class StatisticsAccumulator:
    """Takes the input x [.., K] of a matrix in batches, in the order of the tokens.

    `total` tokens will come; `sample` of them, evenly spaced, are kept as they are. `name` is for complaints.
    """

    def __init__(self, name: str, width: int, total: int, *, hessian: bool = False, sample: int = 0) -> None:
        self.name = name
        self.tokens = 0
        self._amax = torch.zeros(width)
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._wide = torch.float64 if width <= WIDE_SUMS else torch.float32
        self._hessian = torch.zeros(width, width, dtype=self._wide) if hessian else None
        count = min(sample, total)
        self._wanted = ((np.arange(count) + 0.5) * total / max(count, 1)).astype(np.int64)
        self._sample = np.empty((count, width), np.float32)

    def add(self, x: torch.Tensor) -> None:
        """The next tokens. Raises InputError (`calibrate.not_finite`) for NaN and Inf."""
        rows = x.reshape(-1, x.shape[-1])
        magnitudes = rows.abs()
        amax = magnitudes.amax(0)
        if not bool(torch.isfinite(amax).all()):
            raise InputError(
                "calibrate.not_finite",
                f"{self.name} holds NaN or Inf (tokens {self.tokens} to {self.tokens + len(rows)} of the data)",
                "the model overflows in float32 on this text: check the checkpoint, or a layer before this one",
            )
        torch.maximum(self._amax, amax, out=self._amax)
        self._sum += magnitudes.sum(0)
        del magnitudes
        self._keep_sample(rows)
        if self._hessian is not None:
            _add_products(self._hessian, rows.to(self._wide))
        self.tokens += len(rows)

    def finish(self) -> InputStatistics:
        """The statistics of all tokens; the accumulator is empty afterwards."""
        hessian, self._hessian = self._hessian, None
        if hessian is not None:
            _mirror(hessian)
            hessian = hessian.div_(max(self.tokens, 1)).float()
        mean = self._sum / max(self.tokens, 1)
        return InputStatistics(
            tokens=self.tokens,
            amax=self._amax.numpy(),
            mean_abs=mean.float().numpy(),
            hessian=None if hessian is None else hessian.numpy(),
            sample=self._sample if len(self._sample) else None,
        )

    def _keep_sample(self, rows: torch.Tensor) -> None:
        first, last = np.searchsorted(self._wanted, [self.tokens, self.tokens + len(rows)])
        if first < last:
            self._sample[first:last] = rows[torch.from_numpy(self._wanted[first:last] - self.tokens)].numpy()


def _panels(width: int) -> list[tuple[int, int]]:
    step = max(64, -(-width // HESSIAN_PANELS))
    return [(start, min(start + step, width)) for start in range(0, width, step)]


def _add_products(hessian: torch.Tensor, rows: torch.Tensor) -> None:
    """hessian += rowsT rows, the upper triangle in panels: a matrix product of little more than half the work."""
    for start, stop in _panels(len(hessian)):
        hessian[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def _mirror(hessian: torch.Tensor) -> None:
    """Copy the panels above the diagonal below it."""
    for start, stop in _panels(len(hessian)):
        hessian[stop:, start:stop] = hessian[start:stop, stop:].T
