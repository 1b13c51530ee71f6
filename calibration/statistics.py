"""What calibration text says about the input of a matrix: the numbers that the algorithms work from."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class InputStatistics:
    """The input x [K] of one matrix (or of several that share it), seen over `tokens` tokens; all float32.

    amax [K]: largest |x|; mean_abs [K]: mean |x|; hessian [K, K]: mean of x xT, so that the mean squared error of
    outputs under a change D [N, K] of the weights is tr(D H DT); sample [T, K]: some of the inputs themselves.
    """

    tokens: int
    amax: np.ndarray
    mean_abs: np.ndarray
    hessian: np.ndarray | None = None
    sample: np.ndarray | None = None

    def scaled(self, scale: np.ndarray) -> "InputStatistics":
        """The statistics of x / scale, for a positive scale [K]."""
        by = (1 / scale.astype(np.float64)).astype(np.float32)
        return replace(
            self,
            amax=self.amax * by,
            mean_abs=self.mean_abs * by,
            hessian=None if self.hessian is None else self.hessian * by[:, None] * by[None, :],
            sample=None if self.sample is None else self.sample * by,
        )
