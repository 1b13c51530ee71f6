"""Randomised Hadamard rotations: orthogonal in float64, the products with their matrix, the same in any portions."""

import numpy as np
import pytest

from calibration.rotation import Rotation, dct_matrix, hadamard_matrix

SIZES = [1, 2, 3, 8, 15, 30, 64, 96, 160, 172, 256]


def sylvester(size: int) -> np.ndarray:
    """Entries (-1)^(ones in i AND j), the closed form of Sylvester's construction."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_orthogonal_to_float64(size: int, seed: int) -> None:
    q = Rotation(size, seed).matrix()
    # Sums of n products of numbers near n^-0.5, each rounded by 2^-53: a few units in the last place of 1.
    assert np.abs(q @ q.T - np.eye(size)).max() <= 16 * np.finfo(np.float64).eps
    assert np.abs(q.T @ q - np.eye(size)).max() <= 16 * np.finfo(np.float64).eps


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_signs_times_hadamard_times_cosines(size: int) -> None:
    rotation = Rotation(size, 7)
    power = size & -size
    expected = rotation.signs[:, None] * np.kron(sylvester(power) / np.sqrt(power), dct_matrix(size // power))
    np.testing.assert_allclose(rotation.matrix(), expected, rtol=0, atol=4 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_hadamard_matrices_are_their_closed_form(size: int) -> None:
    np.testing.assert_array_equal(hadamard_matrix(size), sylvester(size))


@pytest.mark.parametrize("size", [*SIZES, 3072, 4096, 5120])
def test_no_factor_is_as_large_as_the_matrix(size: int) -> None:
    left, right = (len(factor) for factor in Rotation(size).factors)
    odd = size // (size & -size)
    assert left * right == size and max(left, right) <= max(2 * size**0.5, odd)


@pytest.mark.parametrize("size", [1, 3, 5, 7, 11])
def test_cosines_against_their_definition(size: int) -> None:
    rows, columns = np.arange(size, dtype=np.longdouble)[:, None], np.arange(size, dtype=np.longdouble)
    pi = 4 * np.arctan(np.longdouble(1))
    expected = np.cos(pi * (rows + 0.5) * columns / size) * np.sqrt(np.where(columns == 0, 1, 2) / np.longdouble(size))
    # Near pi / 2 the error of the angle is what remains: half a unit in the last place of 2, and the products'.
    np.testing.assert_allclose(dct_matrix(size), expected.astype(np.float64), rtol=0, atol=4e-16)


def test_signs_are_those_of_the_seed() -> None:
    assert set(Rotation(64, 3).signs) == {-1.0, 1.0}
    np.testing.assert_array_equal(Rotation(64, 3).signs, Rotation(64, 3).signs)
    assert (Rotation(64, 3).signs != Rotation(64, 4).signs).any()


@pytest.mark.parametrize("size", [8, 30, 96, 160])
def test_a_vectors_result_is_its_own(size: int) -> None:
    vectors = np.random.default_rng(1).standard_normal((37, size)).astype(np.float32)
    rotation = Rotation(size, 2)
    whole = rotation.apply(vectors)
    for count in (1, 2, 5, 16):
        parts = [rotation.apply(vectors[low : low + count]) for low in range(0, 37, count)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), np.linalg.norm(vectors.astype(np.float64), axis=1))


def test_an_outlier_spreads_over_all_channels() -> None:
    vector = np.zeros(256)
    vector[9] = 64.0
    np.testing.assert_array_equal(np.abs(Rotation(256).apply(vector)), np.full(256, 4.0))
