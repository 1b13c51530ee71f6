"""Randomised Hadamard rotations of any size, applied without their matrix."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix Q = diag(signs) (H / sqrt(2^k) (x) C) of size n = 2^k m with m odd.

    H is Sylvester's Hadamard matrix of size 2^k, C the orthonormal DCT-II of size m (1 where n is a power of two),
    the signs are drawn from the seed: a randomised Hadamard matrix as in QuIP# (arXiv:2402.04396, section 3) and
    QuaRot (arXiv:2404.00456, section 3). Sizes without a power of two spread over the cosines instead.
    """

    size: int
    seed: int = 0

    @cached_property
    def signs(self) -> np.ndarray:
        """float64 [n] of +1 and -1, from numpy's PCG64 seeded with (seed, n)."""
        bits = np.random.Generator(np.random.PCG64([self.seed, self.size])).integers(0, 2, self.size)
        return 1.0 - 2.0 * bits

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """H_a and H_b (x) C with H = H_a (x) H_b, float64, of sizes near one another; H without its square root."""
        power = self.size & -self.size
        odd = self.size // power
        left = 1
        while left * left < self.size and left < power:
            left *= 2
        return hadamard_matrix(left), np.kron(hadamard_matrix(power // left), dct_matrix(odd))

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """x Q for vectors x along the last axis: [.., n] -> float64 [.., n].

        (A (x) B) applied to a vector is A X B, the vector being the rows of X: two products with small matrices,
        which a processor takes less time for than for the additions of a fast transform. Each vector's result
        depends on itself alone, to the last bit, however many are given at once.
        """
        left, right = self.factors
        power = self.size & -self.size
        weighted = np.multiply(vectors, self.signs * power**-0.5, dtype=np.float64)
        blocks = weighted.reshape(-1, len(left), len(right))
        return np.asarray((left @ (blocks @ right)).reshape(vectors.shape))

    def matrix(self) -> np.ndarray:
        """Q itself, float64 [n, n]."""
        return self.apply(np.eye(self.size))


def hadamard_matrix(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix of a power of two: H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]]; entries +1 and -1."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II, float64 [n, n]: column j is cos(pi (2 i + 1) j / 2 n), scaled to norm 1."""
    # Whole turns are taken off while the numbers are integers: cosines of small angles are exact to the last place.
    turns = np.outer(2 * np.arange(size) + 1, np.arange(size)) % (4 * size)
    angles = np.pi * np.where(turns > 2 * size, turns - 4 * size, turns) / (2 * size)
    scale = np.full(size, np.sqrt(2 / size))
    scale[0] = np.sqrt(1 / size)
    return np.asarray(np.cos(angles) * scale)
