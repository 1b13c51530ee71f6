from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.targets.tvm.kernels.calls import all_profiles, outside_calls
from tests.targets.tvm.kernels.native import aligned, compiled, every_profile
from tests.targets.tvm.kernels.packed_weights import bfloat_bits, pack_floats

pytest.importorskip("tvm")
from targets.tvm.isa import Isa
from targets.tvm.kernels.linear_float import float_tiles, linear_float

KINDS = ("fp32", "fp16", "bf16", "fp8")


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "fp8":
        return values.astype(ml_dtypes.float8_e4m3fn)
    return bfloat_bits(values) if kind == "bf16" else values.astype({"fp32": np.float32, "fp16": np.float16}[kind])


def widened(weights: np.ndarray, kind: str) -> np.ndarray:
    wide = (weights.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else weights
    return wide.astype(np.float64)


def reference(x: np.ndarray, weights: np.ndarray, bias: Any, epilogue: str, before: np.ndarray) -> np.ndarray:
    product = x.astype(np.float64) @ weights.T + bias
    if epilogue == "swiglu":
        gate, up = np.split(product, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up
    return before + product if epilogue == "add" else product


def check(isa: Isa, kind: str, rows: int, width: int, epilogue: str, bias: bool, counts: tuple[int, ...]) -> None:
    random = np.random.default_rng(rows + width)
    weights = stored(random.normal(size=(rows, width)).astype(np.float32), kind)
    offsets = aligned(random.normal(size=rows).astype(np.float32))
    factors = random.lognormal(size=(rows, 1)).astype(np.float32) if kind == "fp8" else None
    packed = aligned(pack_floats(isa, weights, epilogue == "swiglu", factors))
    run = compiled(linear_float(isa, "linear", kind, rows, width, epilogue, bias), isa)
    for count in counts:
        x = aligned(random.normal(size=(count, width)).astype(np.float32))
        y = aligned(random.normal(size=(count + 1, rows // 2 if epilogue == "swiglu" else rows)).astype(np.float32))
        before = y.copy()
        run(x, packed, *([offsets] if bias else []), y[:count])
        wide = widened(weights, kind) * (1 if factors is None else factors)
        expected = reference(x, wide, offsets if bias else 0.0, epilogue, before[:count])
        # Every addition of a float32 sum errs by at most 2^-24 of the magnitudes; the epilogue adds a few roundings.
        magnitude = np.abs(x).astype(np.float64) @ np.abs(wide).T + np.abs(offsets)
        if epilogue == "swiglu":
            magnitude = np.prod(np.split(magnitude + 1, 2, axis=1), axis=0)
        assert (np.abs(y[:count] - expected) <= (magnitude + np.abs(expected)) * 2.0**-24 * (width + 16)).all()
        np.testing.assert_array_equal(y[count], before[count])


@every_profile
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows(isa: Isa, kind: str) -> None:
    check(isa, kind, 70, 45, "plain", False, (1, 2, 3, 5, 7, 12, 13, 14, 25, 31))


@every_profile
def test_fp8_rows_do_not_depend_on_those_beside_them(isa: Isa) -> None:
    """To the last bit: what is rounded to E4M3 behind them would tell."""
    random = np.random.default_rng(1)
    weights = stored(random.normal(size=(38, 45)).astype(np.float32), "fp8")
    packed = aligned(pack_floats(isa, weights, False, random.lognormal(size=(38, 1)).astype(np.float32)))
    run = compiled(linear_float(isa, "linear", "fp8", 38, 45, "plain", False), isa)
    x = aligned(random.normal(size=(25, 45)).astype(np.float32))
    together = aligned(np.empty((25, 38), np.float32))
    run(x, packed, together)
    for row in range(25):
        alone = aligned(np.empty((1, 38), np.float32))
        run(aligned(x[row : row + 1]), packed, alone)
        np.testing.assert_array_equal(alone[0], together[row])


@every_profile
@pytest.mark.parametrize(
    "rows, epilogue, bias",
    [(64, "plain", True), (9, "add", False), (64, "add", True), (64, "swiglu", False), (38, "swiglu", True)],
)
def test_epilogues(isa: Isa, rows: int, epilogue: str, bias: bool) -> None:
    check(isa, "fp32", rows, 32, epilogue, bias, (1, 7))


@every_profile
@pytest.mark.parametrize("width", [1, 2, 7])
def test_few_columns(isa: Isa, width: int) -> None:
    check(isa, "fp32", 3, width, "plain", True, (1, 4))


@all_profiles
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_is_called(isa: Isa, kind: str) -> None:
    assert outside_calls(linear_float(isa, "linear", kind, 38, 16, "swiglu", True), isa) == set()


@all_profiles
def test_tiles_are_multiples_of_the_smallest(isa: Isa) -> None:
    tiles = float_tiles(isa)
    assert tiles == tuple(range(tiles[0], tiles[-1] + 1, tiles[0]))
