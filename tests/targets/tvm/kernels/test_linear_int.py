"""Integer matrices against NumPy: exact sums of products, every tail, epilogue, group size and profile."""

import numpy as np
import pytest

from exporter.core.recipe import CHANNEL, Precision
from targets.tvm.activations import activation_rounding
from targets.tvm.isa import Isa
from targets.tvm.kernels.tile import rows_per_tile
from tests.targets.tvm.kernels.calls import all_profiles, outside_calls
from tests.targets.tvm.kernels.native import aligned, compiled, every_profile
from tests.targets.tvm.kernels.packed_weights import (
    TABLED,
    decoded,
    dequantized,
    pack_records,
    random_codes,
    record_group,
)

linear_int = pytest.importorskip("targets.tvm.kernels.linear_int", reason="apache-tvm is not installed").linear_int

GROUPS = ((16, False), (32, True), (128, False), (256, True))
PRECISIONS = [
    *(Precision(kind, group, symmetric) for kind in ("int4", "int8") for group, symmetric in GROUPS),
    *(Precision("int6", group) for group in (16, 32, 128)),
    Precision("nvfp4", 16),
    Precision("mxfp4", 32),
    Precision("int4", 32, activations="int8/token"),
    Precision("int8", 64, activations="int8/tensor"),
]
CHANNELS = [
    Precision("int8", CHANNEL, activations="int8/token"),
    Precision("int8", CHANNEL, False),
    Precision("int4", CHANNEL),
    Precision("int4", CHANNEL, False, "int8/token"),
]
TABLES = {"x86_64": "pshufb", "aarch64": "tbl"}
DOT_PRODUCTS = {"vnni": "vpdpbusd", "maddubs": "pmaddubsw", "sdot": "sdot", "smmla": "sdot", "smull": "smull"}


def packed_by_tile(values: np.ndarray, tile: int) -> np.ndarray:
    """Rows [M, W] in blocks [W][rows of the block], in the shape [M, W]."""
    blocks = [values[first : first + tile].T.reshape(-1) for first in range(0, len(values), tile)]
    return aligned(np.concatenate(blocks).reshape(values.shape))


class Activations:
    """Quantized rows; scales are powers of two, so that the product of a single group is exact."""

    def __init__(self, isa: Isa, rows: int, width: int, precision: Precision, extreme: bool = False) -> None:
        group, rounding = record_group(precision, width), activation_rounding(precision)
        random = np.random.default_rng(rows)
        self.codes = random.integers(-127, 128, (rows, width)).astype(np.int8)
        if extreme:
            self.codes[...] = np.where(random.random((rows, 1)) < 0.5, -127, 127)
        self.groups = self.codes.reshape(rows, -1, group).astype(np.int64)
        exponents = random.integers(-9, -6, self.groups.shape[:2])
        if rounding == "token":
            exponents[...] = 0
        bases = 2.0 ** random.integers(0, 3, rows)
        self.scales = np.exp2(exponents).astype(np.float32)
        tile = rows_per_tile(isa)
        words = self.codes.view(np.int32)
        sums = self.groups.sum(axis=2).astype(np.int32)
        if rounding == "group":
            self.packed = tuple(packed_by_tile(part, tile) for part in (words, self.scales, sums))
            return
        self.scales *= bases.astype(np.float32)[:, None]
        shifts = (exponents.astype(np.int32) + 32) << 23
        self.packed = tuple(packed_by_tile(part, tile) for part in (words, shifts, sums))
        self.packed += (aligned((bases * 2.0**-32).astype(np.float32)),)


class Matrix:
    """A random matrix, its packed bytes and a function that multiplies by it in float64 from exact integer sums."""

    def __init__(self, isa: Isa, precision: Precision, rows: int, width: int, interleaved: bool = False) -> None:
        self.codes, self.scales, self.zeros = random_codes(precision, rows, width)
        self.precision = precision
        self.packed = aligned(pack_records(isa, precision, self.codes, self.scales, self.zeros, interleaved))

    def saturate(self) -> None:
        """Codes and zero points become the least and the greatest, in turns."""
        levels = 1 << self.precision.bits
        if self.precision.kind in ("nvfp4", "mxfp4"):
            self.codes[...] = np.where(np.arange(len(self.codes))[:, None] % 2, 7, 15)
            return
        low = -levels // 2 if self.precision.symmetric else 0
        turns = np.arange(len(self.codes))[:, None]
        self.codes[...] = np.where(turns % 2, low, low + levels - 1)
        if self.zeros is not None:
            self.zeros[...] = np.where(turns % 3, 0, levels - 1)

    def times(self, x: Activations, unit: int = 0) -> np.ndarray:
        """With `unit`, what codes stand for is rounded to parts of it."""
        values = decoded(self.precision, self.codes).astype(np.float64)
        groups = (np.rint(values * unit) / unit if unit else values).reshape(*self.scales.shape, -1)
        if self.zeros is not None:
            groups = groups - self.zeros[..., None]
        groups = (groups * self.scales[..., None]).reshape(len(groups), *x.groups.shape[1:])
        return np.einsum("mgk,ngk,mg->mn", x.groups, groups, x.scales.astype(np.float64))


def row_counts(isa: Isa) -> tuple[int, ...]:
    """One row, every rest of a tile, several tiles."""
    tile = rows_per_tile(isa)
    return (*range(1, tile + 2), 3 * tile - 1)


@every_profile
@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
def test_sums_are_exact(isa: Isa, precision: Precision) -> None:
    """One group of columns and scales that are powers of two: random codes, then the largest ones of every sign."""
    width, rows = precision.group_size, 2 * isa.lanes + 3
    matrix = Matrix(isa, precision, rows, width)
    run = compiled(linear_int(isa, "exact", precision, rows, width, "plain", False), isa)
    for extreme in (False, True):
        if extreme:
            matrix.saturate()
        matrix.scales[...] = 0.0078125
        packed = aligned(pack_records(isa, precision, matrix.codes, matrix.scales, matrix.zeros))
        for count in row_counts(isa):
            x, y = (
                Activations(isa, count, width, precision, extreme),
                aligned(np.full((count, rows), np.nan, np.float32)),
            )
            run(*x.packed, packed, y)
            np.testing.assert_array_equal(y, matrix.times(x).astype(np.float32))


@every_profile
@pytest.mark.parametrize(
    "epilogue, bias, rows", [("plain", True, 38), ("add", False, 38), ("swiglu", True, 38), ("swiglu", False, 64)]
)
def test_epilogues(isa: Isa, epilogue: str, bias: bool, rows: int) -> None:
    precision, width = Precision("int4", 32, not bias), 96
    matrix = Matrix(isa, precision, rows, width, epilogue == "swiglu")
    run = compiled(linear_int(isa, "linear", precision, rows, width, epilogue, bias), isa)
    random = np.random.default_rng(1)
    added = aligned(random.normal(size=rows).astype(np.float32))
    columns = rows // 2 if epilogue == "swiglu" else rows
    for count in row_counts(isa):
        x = Activations(isa, count, width, precision)
        before = random.normal(size=(count, columns)).astype(np.float32)
        y = aligned(before)
        run(*x.packed, matrix.packed, *([added] if bias else []), y)
        expected = matrix.times(x) + (added if bias else 0)
        if epilogue == "add":
            expected += before
        if epilogue == "swiglu":
            gate, up = expected[:, :columns], expected[:, columns:]
            expected = gate / (1 + np.exp(-gate)) * up
        # A few float32 roundings of a sum of three groups.
        np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@every_profile
@pytest.mark.parametrize("precision", CHANNELS, ids=Precision.describe)
@pytest.mark.parametrize("width", [16, 96, 320])
def test_scales_of_rows(isa: Isa, precision: Precision, width: int) -> None:
    """A record for each of the largest groups that divide the width; scales are powers of two, sums exact."""
    rows = isa.lanes + 5
    matrix = Matrix(isa, precision, rows, width)
    matrix.scales[...] = np.exp2(np.arange(rows) % 5 - 9)[:, None]
    packed = aligned(pack_records(isa, precision, matrix.codes, matrix.scales, matrix.zeros))
    run = compiled(linear_int(isa, "rows", precision, rows, width, "plain", False), isa)
    for count in row_counts(isa):
        x, y = Activations(isa, count, width, precision), aligned(np.full((count, rows), np.nan, np.float32))
        run(*x.packed, packed, y)
        np.testing.assert_array_equal(y, matrix.times(x).astype(np.float32))


@every_profile
@pytest.mark.parametrize(
    "precision", [Precision("int4", 32), Precision("nvfp4", 16), Precision("mxfp4", 32)], ids=Precision.describe
)
def test_long_rows(isa: Isa, precision: Precision) -> None:
    """Many groups: the error is that of adding float32 numbers."""
    rows, width = 70, 4096
    matrix = Matrix(isa, precision, rows, width)
    run = compiled(linear_int(isa, "long", precision, rows, width, "plain", False), isa)
    x, y = Activations(isa, 7, width, precision), aligned(np.full((7, rows), np.nan, np.float32))
    run(*x.packed, matrix.packed, y)
    expected = matrix.times(x)
    assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < 3e-7
    reference = x.groups.astype(np.float64) * x.scales[..., None]
    floats = reference.reshape(7, -1) @ dequantized(precision, matrix.codes, matrix.scales, matrix.zeros).T.astype(
        np.float64
    )
    np.testing.assert_allclose(expected, floats, rtol=1e-9)


@every_profile
@pytest.mark.parametrize("group", [16, 64, 256])
def test_nf4_is_multiplied_by_its_levels_in_16_bits(isa: Isa, group: int) -> None:
    """Exact sums of whole numbers, round(32512 * level); their products with scales are rounded. A level is off by at
    most half of 1 / 32512 of the group's largest weight."""
    precision, rows, width = Precision("nf4", group), 2 * isa.lanes + 3, 256
    matrix = Matrix(isa, precision, rows, width)
    run = compiled(linear_int(isa, "nf4", precision, rows, width, "plain", False), isa)
    for count in row_counts(isa):
        x, y = (
            Activations(isa, count, width, precision, count == 2),
            aligned(np.full((count, rows), np.nan, np.float32)),
        )
        run(*x.packed, matrix.packed, y)
        magnitudes = np.einsum("mgk,ng,mg->mn", np.abs(x.groups), matrix.scales.astype(np.float64), x.scales)
        assert (np.abs(y - matrix.times(x)) <= 0.5 / 32512 * magnitudes).all()
        whole = matrix.times(x, 32512)
        assert np.linalg.norm(y - whole) <= 3e-7 * np.linalg.norm(whole)


@all_profiles
@pytest.mark.parametrize(
    "precision",
    [
        Precision("int4", 32),
        Precision("int6", 32),
        Precision("int8", 64, False),
        Precision("nvfp4", 16),
        Precision("mxfp4", 32),
        Precision("nf4", 64),
    ],
    ids=Precision.describe,
)
def test_instructions(isa: Isa, precision: Precision) -> None:
    """Each profile multiplies bytes with its own instruction, and calls nothing."""
    function = linear_int(isa, "linear", precision, 70, 128, "swiglu", True)
    assert outside_calls(function, isa) == set()
    text = assembly(function, isa)
    assert DOT_PRODUCTS[isa.dot] in text
    assert (TABLES[isa.machine] in text) == (precision.kind in TABLED)


def assembly(function: object, isa: Isa) -> str:
    import tvm

    described = {"kind": "llvm", "mtriple": f"{isa.machine}-linux-gnu", "mcpu": isa.mcpu, "mattr": list(isa.mattr)}
    return str(tvm.compile(function, target=tvm.target.Target(described)).mod.inspect_source("asm"))
