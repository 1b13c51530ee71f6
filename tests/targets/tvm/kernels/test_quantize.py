import numpy as np
import pytest

from tests.targets.tvm.kernels.native import aligned, compiled, every_profile
from tests.targets.tvm.kernels.packed_rows import (
    quantized,
    quantized_by_token,
    quantized_with_exponents,
    unpack_rows,
)

pytest.importorskip("tvm")
from targets.tvm.isa import Isa
from targets.tvm.kernels.norm import norm
from targets.tvm.kernels.quantize import norm_quantize, quantize
from targets.tvm.kernels.tile import rows_per_tile

EPS = 1e-6


FORMULAS = {"group": quantized, "shared-exponent": quantized_with_exponents, "token": quantized_by_token}
each_rounding = pytest.mark.parametrize("rounding", FORMULAS)


def empty(rows: int, width: int, group: int, rounding: str) -> list[np.ndarray]:
    """The outputs with one row more than is written."""
    groups, exponents = width // group, rounding != "group"
    shapes = [(width // 4, np.int32), (groups, np.int32 if exponents else np.float32), (groups, np.int32)]
    outputs = [aligned(np.full((rows + 1, columns), 77, dtype)) for columns, dtype in shapes]
    return [*outputs, *([aligned(np.full(rows + 1, 77, np.float32))] if exponents else [])]


def check(outputs: list[np.ndarray], x: np.ndarray, group: int, rounding: str, isa: Isa) -> None:
    """Exactly what the formulas give for x, and nothing behind it."""
    codes, *parts = (unpack_rows(tensor[: len(x)], rows_per_tile(isa)) for tensor in outputs[:3])
    expected = FORMULAS[rounding](x, group)
    np.testing.assert_array_equal(np.ascontiguousarray(codes).view(np.int8), expected[0])
    for found, exact in zip((*parts, *(tensor[: len(x)] for tensor in outputs[3:])), expected[1:], strict=True):
        np.testing.assert_array_equal(found, exact)
    for tensor in outputs:
        np.testing.assert_array_equal(tensor[len(x)], 77)


@every_profile
@each_rounding
@pytest.mark.parametrize("width, group", [(16, 16), (96, 32), (192, 64), (256, 128), (512, 256)])
def test_codes_scales_and_sums_are_exact(isa: Isa, width: int, group: int, rounding: str) -> None:
    random = np.random.default_rng(width)
    run = compiled(quantize(isa, "quantize", width, group, rounding), isa)
    for rows in (1, 2, 5, 6, 7, 13):
        x = random.normal(size=(rows, width)) * random.lognormal(0, 3, (rows, 1))
        x = aligned((x * np.repeat(random.lognormal(0, 3, (rows, width // 16)), 16, axis=1)).astype(np.float32))
        outputs = empty(rows, width, group, rounding)
        run(x, *(tensor[:rows] for tensor in outputs))
        check(outputs, x, group, rounding, isa)


@every_profile
@each_rounding
def test_ties_go_to_even_and_zeros_stay_zero(isa: Isa, rounding: str) -> None:
    x = aligned(np.zeros((3, 64), np.float32))
    x[0, :4] = (127, 0.5, 1.5, -2.5)
    x[1, 32:34] = (-127, 126.5)
    outputs = empty(3, 64, 32, rounding)
    compiled(quantize(isa, "quantize", 64, 32, rounding), isa)(x, *(tensor[:3] for tensor in outputs))
    check(outputs, x, 32, rounding, isa)
    codes = unpack_rows(outputs[0][:3], rows_per_tile(isa)).copy().view(np.int8)
    np.testing.assert_array_equal(codes[0, :4], (127, 0, 2, -2))
    np.testing.assert_array_equal(codes[1, 32:34], (-127, 126))


@every_profile
def test_exponents_at_their_bounds(isa: Isa) -> None:
    """Powers of two of the row's largest and their neighbours, groups 2^-24 and less, tiny, huge and zero rows."""
    x = np.zeros((7, 16 * 16), np.float32)
    ratios = np.exp2([0, -1, -2, -3, -7, -23, -24, -25, -60]).astype(np.float32)
    neighbours = [np.nextafter(ratio, side, dtype=np.float32) for ratio in ratios[1:4] for side in (0, 1)]
    for row, top in enumerate((1.0, 127.0, 3.3e38, 2.0**-79, 2.0**-80, 2.0**-81, 1e-44)):
        x[row, : 15 * 16 : 16] = np.float32(top) * np.concatenate([ratios, neighbours])
    x, outputs = aligned(x), empty(7, 256, 16, "shared-exponent")
    compiled(quantize(isa, "quantize", 256, 16, "shared-exponent"), isa)(x, *(tensor[:7] for tensor in outputs))
    check(outputs, x, 16, "shared-exponent", isa)
    codes = unpack_rows(outputs[0][:7], rows_per_tile(isa)).copy().view(np.int8)
    assert codes[:5].max() == 127 and codes.min() == 0 and not codes[5:].any()
    assert np.isfinite(outputs[3]).all() and not outputs[3][5:7].any()


@every_profile
@each_rounding
@pytest.mark.parametrize("gather", [False, True])
def test_norm_quantize_is_norm_and_then_quantize(isa: Isa, gather: bool, rounding: str) -> None:
    random = np.random.default_rng(5)
    width, group = 160, 32
    both = compiled(norm_quantize(isa, "both", width, group, EPS, gather, rounding), isa)
    alone = compiled(norm(isa, "norm", width, EPS, gather), isa)
    gamma = aligned(random.normal(size=width).astype(np.float32))
    for tokens in (1, 4, 9):
        x = aligned(random.normal(size=(tokens, width)).astype(np.float32))
        rows = [aligned(random.integers(0, tokens, tokens + 1).astype(np.int32))] if gather else []
        count = tokens + gather
        outputs, normalized = empty(count, width, group, rounding), aligned(np.empty((count, width), np.float32))
        both(x, *rows, gamma, *(tensor[:count] for tensor in outputs))
        alone(x, *rows, gamma, normalized)
        check(outputs, normalized, group, rounding, isa)


def test_columns_that_are_no_groups_are_refused() -> None:
    from targets.tvm.isa import profile

    with pytest.raises(ValueError, match="100 columns in groups of 32"):
        quantize(profile("x86-64-v3"), "quantize", 100, 32)
