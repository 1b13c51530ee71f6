from typing import Any

import numpy as np
import pytest

from tests.targets.tvm.kernels.native import aligned, compiled, every_profile

pytest.importorskip("tvm")
from tvm.script.ir_builder import tirx as T

from targets.tvm.isa import Isa
from targets.tvm.kernels.epilogue import Epilogue
from targets.tvm.kernels.ir import Registers, arguments, kernel, load, size
from targets.tvm.kernels.partial import pieces
from targets.tvm.kernels.vector import Vectors

ROWS = 3


def epilogue_kernel(isa: Isa, kind: str, rows: int, has_bias: bool) -> Any:
    """Writes given accumulators [M, blocks, 2 * lanes] through the epilogue."""
    with kernel("write") as finished:
        vectors = Vectors(isa)
        epilogue = Epilogue(vectors, kind, rows)
        block_floats, m = 2 * isa.lanes, size("m")
        shapes = {"sums": ((m, epilogue.blocks * block_floats), "float32")}
        if has_bias:
            shapes["bias"] = ((rows,), "float32")
        sums, *bias, y = arguments(**shapes, y=((m, epilogue.width), "float32"))
        with T.serial(0, m) as row, T.serial(0, epilogue.blocks) as block:
            values = Registers("float32", isa.lanes, 2)
            for number in range(2):
                start = (row * epilogue.blocks + block) * block_floats + number * isa.lanes
                values[number] = load(sums, start, isa.lanes)
            epilogue.write(y, row, block, values, 0, bias[0] if bias else None)
    return finished()


def blocked(product: np.ndarray, lanes: int, gated: bool) -> np.ndarray:
    """[M, N] as the accumulators of its blocks, NaN where there is no row."""
    if not gated:
        return np.pad(product, ((0, 0), (0, -product.shape[1] % (2 * lanes))), constant_values=np.nan)
    gate, up = np.split(product, 2, axis=1)
    halves = [
        np.pad(half, ((0, 0), (0, -half.shape[1] % lanes)), constant_values=np.nan).reshape(len(half), -1, lanes)
        for half in (gate, up)
    ]
    return np.concatenate(halves, axis=2).reshape(len(product), -1)


def expected(kind: str, product: np.ndarray, before: np.ndarray) -> np.ndarray:
    if kind == "swiglu":
        gate, up = np.split(product.astype(np.float64), 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up
    return before + product if kind == "add" else product


@every_profile
@pytest.mark.parametrize("kind", ["plain", "add", "swiglu"])
@pytest.mark.parametrize("rows, has_bias", [(2, False), (10, True), (62, True), (64, False), (64, True), (70, False)])
def test_blocks_become_rows(isa: Isa, kind: str, rows: int, has_bias: bool) -> None:
    random = np.random.default_rng(rows)
    product = random.normal(0, 4, (ROWS, rows)).astype(np.float32)
    product[0, :2] = (-200, 200)
    bias = random.normal(size=rows).astype(np.float32)
    width = rows // 2 if kind == "swiglu" else rows
    y = aligned(random.normal(size=(ROWS + 1, width)).astype(np.float32))
    before = y.copy()
    run = compiled(epilogue_kernel(isa, kind, rows, has_bias), isa)
    arrays = [aligned(blocked(product, isa.lanes, kind == "swiglu"))] + [aligned(bias)] * has_bias
    run(*arrays, y[:ROWS])
    result = expected(kind, product + bias if has_bias else product, before[:ROWS])
    if kind == "swiglu":  # the exponential is a polynomial good to 1e-6
        np.testing.assert_allclose(y[:ROWS], result, rtol=2e-6, atol=1e-30)
    else:
        np.testing.assert_array_equal(y[:ROWS], result)
    np.testing.assert_array_equal(y[ROWS], before[ROWS])


@pytest.mark.parametrize("kind, rows", [("gelu", 4), ("swiglu", 5)])
def test_what_does_not_exist_is_refused(kind: str, rows: int) -> None:
    with pytest.raises(ValueError, match=f"{kind}.*{rows}"):
        Epilogue(Vectors(next(iter(every_profile.args[1]))), kind, rows)


def test_pieces_are_powers_of_two() -> None:
    assert list(pieces(13)) == [(0, 8), (8, 4), (12, 1)]
    assert list(pieces(0)) == []
