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
    def doublings(self) -> int:
        """k: how often 2 divides the size."""
        return (self.size & -self.size).bit_length() - 1

    @cached_property
    def signs(self) -> np.ndarray:
        """float64 [n] of +1 and -1, from numpy's PCG64 seeded with (seed, n)."""
        bits = np.random.Generator(np.random.PCG64([self.seed, self.size])).integers(0, 2, self.size)
        return 1.0 - 2.0 * bits

    @cached_property
    def cosines(self) -> np.ndarray:
        """C, float64 [m, m]."""
        return dct_matrix(self.size >> self.doublings)

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """x Q for vectors x along the last axis: [.., n] -> float64 [.., n].

        Each vector's result depends on itself alone, to the last bit, however many are given at once.
        """
        flat = np.multiply(vectors, self.signs, dtype=np.float64).reshape(-1, 1 << self.doublings, len(self.cosines))
        if len(self.cosines) > 1:
            flat = flat @ self.cosines
        return hadamard(flat).reshape(vectors.shape)

    def matrix(self) -> np.ndarray:
        """Q itself, float64 [n, n]."""
        return self.apply(np.eye(self.size))


def hadamard(blocks: np.ndarray) -> np.ndarray:
    """Sylvester's Hadamard transform along the middle axis of [b, 2^k, m], divided by sqrt(2^k); overwrites its input.

    Every step takes sums and differences of neighbours and stores them in the two halves: after k steps the indices
    are back in their order (the fast transform with constant geometry, Pease 1968).
    """
    length = blocks.shape[1]
    source, target = blocks, np.empty_like(blocks)
    for _ in range(length.bit_length() - 1):
        even, odd = source[:, 0::2], source[:, 1::2]
        np.add(even, odd, out=target[:, : length // 2])
        np.subtract(even, odd, out=target[:, length // 2 :])
        source, target = target, source
    source *= length**-0.5
    return source


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II, float64 [n, n]: column j is cos(pi (2 i + 1) j / 2 n), scaled to norm 1."""
    # Whole turns are taken off while the numbers are integers: cosines of small angles are exact to the last place.
    turns = np.outer(2 * np.arange(size) + 1, np.arange(size)) % (4 * size)
    angles = np.pi * np.where(turns > 2 * size, turns - 4 * size, turns) / (2 * size)
    scale = np.full(size, np.sqrt(2 / size))
    scale[0] = np.sqrt(1 / size)
    return np.asarray(np.cos(angles) * scale)
