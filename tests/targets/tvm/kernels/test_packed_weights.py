"""The product's packing writes the format that kernels are tested with."""

import ml_dtypes
import numpy as np
import pytest

from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from targets.tvm.isa import PROFILES
from targets.tvm.packing import layout
from tests.targets.tvm.kernels.packed_weights import pack_floats, pack_records, random_codes

SCHEMES = ((16, True), (32, False))
PRECISIONS = [
    *(Precision(kind, group, symmetric) for kind in ("int4", "int8") for group, symmetric in SCHEMES),
    Precision("int6", 16),
    Precision("int6", 32),
]


@pytest.mark.parametrize("isa", PROFILES.values(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
@pytest.mark.parametrize("rows, interleaved", [(38, False), (64, False), (38, True), (64, True)])
def test_integer_records(isa, precision, rows, interleaved) -> None:
    codes, scales, zeros = random_codes(precision, rows, 96)
    narrow = codes.astype(np.int8 if precision.symmetric else np.uint8)

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
