import ml_dtypes
import numpy as np
import pytest

from tests.targets.tvm.kernels.native import aligned, compiled, every_profile
from tests.targets.tvm.kernels.packed_weights import bfloat_bits, dequantized, pack_floats, pack_records, random_codes

pytest.importorskip("tvm")
from exporter.core.recipe import CHANNEL, Precision
from targets.tvm.isa import Isa
from targets.tvm.kernels.embedding import embedding_float, embedding_int

IDS = (0, 3, 15, 16, 31, 36, 4)
ROWS = 37

PRECISIONS = [
    Precision("int4", 16),
    Precision("int4", 32),
    Precision("int4", 64, symmetric=False),
    Precision("int6", 16),
    Precision("int6", 128),
    Precision("int8", 32),
    Precision("int8", 128),
    Precision("int8", 16, symmetric=False),
    Precision("int8", CHANNEL),
    Precision("int4", CHANNEL, symmetric=False),
    Precision("nvfp4", 16),
    Precision("mxfp4", 32),
    Precision("nf4", 64),
]


@every_profile
@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
def test_integer_rows_are_exact(isa: Isa, precision: Precision) -> None:
    width = 96 if precision.group_size == CHANNEL else 2 * precision.group_size
    codes, scales, zeros = random_codes(precision, ROWS, width)
    weights = aligned(pack_records(isa, precision, codes, scales, zeros))
    run = compiled(embedding_int(isa, "embedding", precision, ROWS, width), isa)
    for ids in (IDS, IDS[:1], IDS[-2:]):
        hidden = aligned(np.full((len(ids) + 1, width), np.nan, np.float32))
        run(aligned(np.array(ids, np.int32)), weights, hidden[:-1])
        np.testing.assert_array_equal(hidden[:-1], dequantized(precision, codes, scales, zeros)[list(ids)])
        assert np.isnan(hidden[-1]).all()


@every_profile
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("width", [1, 33])
def test_float_rows_are_exact(isa: Isa, kind: str, width: int) -> None:
    values = np.random.default_rng(1).normal(0, 3, (ROWS, width)).astype(np.float32)
    values[3, 0], values[4, 0] = 6e-8, -0.0  # a subnormal float16
    stored = values if kind == "fp32" else values.astype(np.float16) if kind == "fp16" else bfloat_bits(values)
    wide = (stored.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else stored.astype(np.float32)
    hidden = aligned(np.full((len(IDS) + 1, width), np.nan, np.float32))
    run = compiled(embedding_float(isa, "embedding", kind, ROWS, width), isa)
    run(aligned(np.array(IDS, np.int32)), aligned(pack_floats(isa, stored)), hidden[:-1])
    np.testing.assert_array_equal(hidden[:-1], wide[list(IDS)])
    assert np.isnan(hidden[-1]).all()


@every_profile
def test_fp8_rows_are_exact(isa: Isa) -> None:
    """Every code but NaN, subnormals among them, times the row's scale: a power of two, so that nothing is rounded."""
    codes = np.resize(np.setdiff1d(np.arange(256), (127, 255)).astype(np.uint8), (ROWS, 254))
    values = codes.view(ml_dtypes.float8_e4m3fn)
    scales = np.exp2(np.arange(ROWS) - 20.0)[:, None].astype(np.float32)
    hidden = aligned(np.full((len(IDS) + 1, 254), np.nan, np.float32))
    run = compiled(embedding_float(isa, "embedding", "fp8", ROWS, 254), isa)
    run(aligned(np.array(IDS, np.int32)), aligned(pack_floats(isa, values, False, scales)), hidden[:-1])
    np.testing.assert_array_equal(hidden[:-1], (values.astype(np.float32) * scales)[list(IDS)])
    assert np.isnan(hidden[-1]).all()
