"""How much a change of weights changes outputs: the mean squared error under a Hessian, with bounded work."""

from collections.abc import Sequence

import numpy as np

MULTIPLICATIONS = 1 << 34
"""What one look at a candidate may cost, about a third of a second; beyond it, evenly spaced rows stand for all."""


def output_error(changes: np.ndarray, hessian: np.ndarray) -> float:
    """tr(D H DT) of changes D [n, K], float64 at the end."""
    return float(np.einsum("nk,nk->", changes @ hessian, changes, dtype=np.float64))


def representative_rows(weights: Sequence[np.ndarray], cost_of_a_row: int) -> list[np.ndarray]:
    """Rows of each matrix [N, K] float32, all of them where MULTIPLICATIONS allow it."""
    total = sum(len(values) for values in weights)
    step = -(-total * cost_of_a_row // MULTIPLICATIONS)
    return [np.ascontiguousarray(values[::step], np.float32) for values in weights]
