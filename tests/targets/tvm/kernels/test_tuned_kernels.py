"""Whatever the tuning, kernels compute the same numbers."""

import numpy as np
import pytest

from exporter.core.recipe import Precision
from targets.tvm.isa import Isa
from targets.tvm.tuning import DEFAULT, Tuning
from tests.targets.tvm.kernels.native import aligned, compiled, every_profile
from tests.targets.tvm.kernels.packed_weights import pack_records, random_codes

pytest.importorskip("tvm")
from targets.tvm.kernels.attention import attention
from targets.tvm.kernels.linear_int import linear_int
from targets.tvm.kernels.quantize import quantize

PRECISION, ROWS, WIDTH = Precision("int4", 32), 70, 128


def product(isa: Isa, x: np.ndarray, weights: np.ndarray, tuning: Tuning) -> np.ndarray:
    shapes = ((len(x), WIDTH // 4), (len(x), WIDTH // 32), (len(x), WIDTH // 32))
    outputs = [*(aligned(np.zeros(shape, np.int32)) for shape in shapes), aligned(np.zeros(len(x), np.float32))]
    y = aligned(np.full((len(x), ROWS), np.nan, np.float32))
    compiled(quantize(isa, "quantize", WIDTH, 32, "shared-exponent", tuning), isa)(x, *outputs)
    compiled(linear_int(isa, "linear", PRECISION, ROWS, WIDTH, "plain", False, tuning), isa)(*outputs, weights, y)
    return y


@every_profile
@pytest.mark.parametrize("tuning", [Tuning(tile_rows=1), Tuning(tile_rows=3, prefetch=0), Tuning(tile_rows=8)])
def test_products(isa: Isa, tuning: Tuning) -> None:
    weights = aligned(pack_records(isa, PRECISION, *random_codes(PRECISION, ROWS, WIDTH)))
    x = aligned(np.random.default_rng(0).normal(size=(11, WIDTH)).astype(np.float32))
    np.testing.assert_array_equal(product(isa, x, weights, tuning), product(isa, x, weights, DEFAULT))


@every_profile
def test_attention(isa: Isa) -> None:
    random = np.random.default_rng(1)
    q = aligned(random.normal(size=(70, 4 * 32)).astype(np.float32))
    segments = aligned(np.array([[1, 0, 60, 3], [0, 60, 10, 40]], np.int32))
    key = aligned(random.normal(size=(2, 2, 2, 32, 32)).astype(np.float32))
    value = aligned(random.normal(size=(2, 2, 64, 32)).astype(np.float32))
    results = []
    for tuning in (DEFAULT, Tuning(queries=24)):
        y = aligned(np.full(q.shape, np.nan, np.float32))
        compiled(attention(isa, "attention", 4, 2, 32, "fp32", tuning), isa)(q, segments, key, value, y)
        results.append(y)
    # A row's sums do not depend on the rows beside it.
    np.testing.assert_array_equal(*results)
