import numpy as np
import pytest

from tests.targets.tvm.kernels.native import aligned, compiled, every_profile
from tests.targets.tvm.kernels.packed_rows import quantized, unpack_rows

pytest.importorskip("tvm")
from targets.tvm.isa import Isa
from targets.tvm.kernels.norm import norm
from targets.tvm.kernels.quantize import norm_quantize, quantize
from targets.tvm.kernels.tile import rows_per_tile

EPS = 1e-6


def empty(rows: int, width: int, group: int) -> list[np.ndarray]:
    """Codes, scales and sums with one row more than is written."""
    shapes = ((width // 4, np.int32), (width // group, np.float32), (width // group, np.int32))
    return [aligned(np.full((rows + 1, columns), 77, dtype)) for columns, dtype in shapes]


def check(outputs: list[np.ndarray], x: np.ndarray, group: int, isa: Isa) -> None:
    """Exactly what the formulas give for x, and nothing behind it."""
    codes, scales, sums = (unpack_rows(tensor[: len(x)], rows_per_tile(isa)) for tensor in outputs)
    expected = quantized(x, group)
    np.testing.assert_array_equal(np.ascontiguousarray(codes).view(np.int8), expected[0])
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(sums, expected[2])
    for tensor in outputs:
        np.testing.assert_array_equal(tensor[len(x)], 77)


@every_profile
@pytest.mark.parametrize("width, group", [(16, 16), (96, 32), (192, 64), (256, 128), (512, 256)])
def test_codes_scales_and_sums_are_exact(isa: Isa, width: int, group: int) -> None:
    random = np.random.default_rng(width)
    run = compiled(quantize(isa, "quantize", width, group), isa)
    for rows in (1, 2, 5, 6, 7, 13):
        x = aligned((random.normal(size=(rows, width)) * random.lognormal(0, 3, (rows, 1))).astype(np.float32))
        outputs = empty(rows, width, group)
        run(x, *(tensor[:rows] for tensor in outputs))
        check(outputs, x, group, isa)


@every_profile
def test_ties_go_to_even_and_zeros_stay_zero(isa: Isa) -> None:
    x = aligned(np.zeros((2, 64), np.float32))
    x[0, :4] = (127, 0.5, 1.5, -2.5)
    x[1, 32:34] = (-127, 126.5)
    outputs = empty(2, 64, 32)
    compiled(quantize(isa, "quantize", 64, 32), isa)(x, *(tensor[:2] for tensor in outputs))
    check(outputs, x, 32, isa)
    codes = unpack_rows(outputs[0][:2], rows_per_tile(isa)).copy().view(np.int8)
    np.testing.assert_array_equal(codes[0, :4], (127, 0, 2, -2))
    np.testing.assert_array_equal(codes[1, 32:34], (-127, 126))


@every_profile
@pytest.mark.parametrize("gather", [False, True])
def test_norm_quantize_is_norm_and_then_quantize(isa: Isa, gather: bool) -> None:
    random = np.random.default_rng(5)
    width, group = 160, 32
    both = compiled(norm_quantize(isa, "both", width, group, EPS, gather), isa)
    alone = compiled(norm(isa, "norm", width, EPS, gather), isa)
    gamma = aligned(random.normal(size=width).astype(np.float32))
    for tokens in (1, 4, 9):
        x = aligned(random.normal(size=(tokens, width)).astype(np.float32))
        rows = [aligned(random.integers(0, tokens, tokens + 1).astype(np.int32))] if gather else []
        count = tokens + gather
        outputs, normalized = empty(count, width, group), aligned(np.empty((count, width), np.float32))
        both(x, *rows, gamma, *(tensor[:count] for tensor in outputs))
        alone(x, *rows, gamma, normalized)
        check(outputs, normalized, group, isa)


def test_columns_that_are_no_groups_are_refused() -> None:
    from targets.tvm.isa import profile

    with pytest.raises(ValueError, match="100 columns in groups of 32"):
        quantize(profile("x86-64-v3"), "quantize", 100, 32)
