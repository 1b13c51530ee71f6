"""The product's packing writes the format that kernels are tested with."""

import ml_dtypes
import numpy as np
import pytest

from exporter.core.errors import UnsupportedError
from exporter.core.recipe import CHANNEL, Precision
from exporter.core.weights import QuantizedRows
from targets.tvm.isa import PROFILES
from targets.tvm.packing import layout
from tests.targets.tvm.kernels.packed_weights import block_rows, pack_floats, pack_records, random_codes

SCHEMES = ((16, True), (32, False))
PRECISIONS = [
    *(Precision(kind, group, symmetric) for kind in ("int4", "int8") for group, symmetric in SCHEMES),
    Precision("int6", 16),
    Precision("int6", 32),
    Precision("int8", CHANNEL, activations="int8/token"),
    Precision("int4", CHANNEL, False),
    Precision("mxfp4", 32),
    Precision("nf4", 32),
]


@pytest.mark.parametrize("isa", PROFILES.values(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
@pytest.mark.parametrize("rows, interleaved", [(38, False), (64, False), (38, True), (64, True)])
def test_integer_records(isa, precision, rows, interleaved) -> None:
    codes, scales, zeros = random_codes(precision, rows, 96)
    narrow = codes.astype(np.int8 if precision.is_integer and precision.symmetric else np.uint8)

    def read(start: int, stop: int) -> QuantizedRows:
        part = slice(start, stop)
        points = None if zeros is None else zeros[part].astype(np.uint8)
        return QuantizedRows(narrow[part], scales[part].astype(np.float32), points, precision)

    packed = layout(precision, rows, 96, isa, interleaved)
    expected = pack_records(isa, precision, codes, scales, zeros, interleaved)
    np.testing.assert_array_equal(packed.pack(0, packed.blocks, read), expected)
    assert packed.nbytes == expected.nbytes


@pytest.mark.parametrize("kind, dtype", [("fp32", np.float32), ("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("rows, interleaved", [(38, False), (64, False), (38, True), (64, True)])
def test_float_blocks(kind, dtype, rows, interleaved) -> None:
    isa = PROFILES["x86-64-v3"]
    values = np.random.default_rng(0).normal(size=(rows, 7)).astype(dtype)
    packed = layout(Precision(kind), rows, 7, isa, interleaved)
    result = packed.pack(0, packed.blocks, lambda start, stop: values[start:stop])
    np.testing.assert_array_equal(result.view(dtype), pack_floats(isa, values, interleaved))
    assert result.nbytes == packed.nbytes


@pytest.mark.parametrize("isa", PROFILES.values(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("rows, interleaved", [(38, False), (64, True)])
def test_fp8_blocks(isa, rows, interleaved) -> None:
    """Codes as floats lie, then a factor for each row: what kernels read of a code is 2^-8 of it."""
    random = np.random.default_rng(2)
    codes = random.integers(0, 127, (rows, 7)).astype(np.uint8) | random.integers(0, 2, (rows, 7), np.uint8) << 7
    scales = random.lognormal(size=(rows, 1)).astype(np.float32)
    precision = Precision("fp8", CHANNEL)
    packed = layout(precision, rows, 7, isa, interleaved)
    result = packed.pack(
        0, packed.blocks, lambda start, stop: QuantizedRows(codes[start:stop], scales[start:stop], None, precision)
    ).reshape(packed.blocks, -1)
    values = pack_floats(isa, codes, interleaved).reshape(packed.blocks, -1)
    np.testing.assert_array_equal(result[:, : values.shape[1]], values)
    ends = np.ascontiguousarray(result[:, values.shape[1] :]).view(np.float32)
    places = np.array(block_rows(isa, rows, interleaved))
    np.testing.assert_array_equal(ends, np.where(places < 0, 0, scales[places, 0] * 256))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("factor", [2.0**-10, 0.0123, 3e-6])
def test_nvfp4_scales_come_back(factor, interleaved) -> None:
    """Any rows of E4M3 scales times any number: byte and factor give the scale, but for float32 rounding."""
    isa, random = PROFILES["x86-64-v3"], np.random.default_rng(3)
    rows, precision = 64, Precision("nvfp4", 16)
    codes = random.integers(0, 16, (rows, 96)).astype(np.uint8)
    levels = random.integers(0, 127, (rows, 6)).astype(np.uint8)
    levels[5], levels[6, 1:], levels[7] = 0, 0, 126
    codes[3, :16] = np.where(np.arange(16) % 2, 8, 0)  # zeros of both signs: their scale is not asked for
    scales = levels.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(factor)
    scales[3, 0] = np.pi
    rows_of = lambda start, stop: QuantizedRows(codes[start:stop], scales[start:stop], None, precision)  # noqa: E731
    packed = layout(precision, rows, 96, isa, interleaved)
    blocks = packed.pack(0, packed.blocks, rows_of).reshape(packed.blocks, packed.block_bytes)
    records = blocks[:, : packed.factors_at].reshape(packed.blocks, packed.groups, packed.record)
    stored = np.ascontiguousarray(records[:, :, packed.scales_at :]).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    factors = np.ascontiguousarray(blocks[:, packed.factors_at :]).view(np.float32)[:, None]
    places = np.array(block_rows(isa, rows, interleaved))[:, None, :]
    expected = np.where(places < 0, 0, scales.T[np.arange(6)[:, None], places])
    expected[places.repeat(6, axis=1) == 3] *= np.arange(6) > 0
    np.testing.assert_allclose(stored * factors / 128, expected, rtol=2e-7)


@pytest.mark.parametrize(
    "kind, scale, words",
    [
        ("mxfp4", 0.75, "no power of two"),
        ("mxfp4", 2.0**66, r"exceeds 2\^65"),
        ("nvfp4", np.float32([1, 1.03, 1.7]), "E4M3 multiples"),
    ],
)
def test_scales_of_another_form_are_refused(kind, scale, words) -> None:
    group = {"nvfp4": 16, "mxfp4": 32}[kind]
    precision = Precision(kind, group)
    scales = np.broadcast_to(np.float32(scale), (16, 3)).copy()
    source = QuantizedRows(np.full((16, 3 * group), 3, np.uint8), scales, None, precision)
    packed = layout(precision, 16, 3 * group, PROFILES["x86-64-v3"])
    with pytest.raises(UnsupportedError, match=words) as error:
        packed.pack(0, 1, lambda start, stop: source)
    assert error.value.kind == "tvm.scales"
