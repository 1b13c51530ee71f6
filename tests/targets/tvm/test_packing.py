"""Packing piece by piece, and what cannot be packed."""

import numpy as np
import pytest

from exporter.core.errors import UnsupportedError
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from targets.tvm.isa import PROFILES
from targets.tvm.packing import layout

ISA = PROFILES["x86-64-v3"]


def matrix(precision: Precision, rows: int, scale: float = 0.01) -> QuantizedRows:
    random = np.random.default_rng(0)
    groups = 64 // (precision.group_size or 64)
    scales = np.full((rows, groups), scale, np.float32)
    return QuantizedRows(random.integers(-8, 8, (rows, 64)).astype(np.int8), scales, None, precision)


@pytest.mark.parametrize("interleaved", [False, True])
def test_blocks_are_packed_apart(interleaved: bool) -> None:
    """Any cut into calls gives the same bytes, and rows of a call are asked for in ascending order."""
    precision = Precision("int4", 32)
    source = matrix(precision, 74)
    asked: list[int] = []

    def read(start: int, stop: int) -> QuantizedRows:
        assert not asked or start >= asked[-1]
        asked.append(stop)
        return QuantizedRows(source.codes[start:stop], source.scales[start:stop], None, precision)

    packed = layout(precision, 74, 64, ISA, interleaved)
    whole = packed.pack(0, packed.blocks, read)
    assert whole.nbytes == packed.nbytes == packed.blocks * packed.block_bytes
    parts = []
    for first in range(0, packed.blocks, 2):
        asked.clear()
        parts.append(packed.pack(first, min(2, packed.blocks - first), read))
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    with pytest.raises(ValueError, match="blocks"):
        packed.pack(packed.blocks, 1, read)


@pytest.mark.parametrize("scale", [70000.0, np.inf, np.nan])
def test_scales_must_fit_float16(scale: float) -> None:
    precision = Precision("int4", 32)
    packed, source = layout(precision, 16, 64, ISA), matrix(precision, 16, scale)
    with pytest.raises(UnsupportedError, match="does not fit float16") as caught:
        packed.pack(0, 1, lambda start, stop: source)
    assert caught.value.exit_code == 3


def test_groups_must_divide_the_width() -> None:
    with pytest.raises(UnsupportedError, match="groups of 64 do not divide a matrix of 96 columns"):
        layout(Precision("int4", 64), 32, 96, ISA)
