"""Effective nvfp4 scales, taken apart again."""

import numpy as np
import pytest

from calibration.coded_floats import nvfp4_matrix_scale
from calibration.float_codecs import decode_e4m3
from calibration.rtn import quantize_rows
from exporter.core.errors import UnsupportedError
from exporter.core.recipe import Precision
from targets.tensorrt_llm.nvfp4_scales import block_codes, common_scale

RNG = np.random.default_rng(8)
CODES = np.arange(1, 127, dtype=np.uint8)
"""Every positive E4M3 number."""


@pytest.mark.parametrize("matrix", np.exp(RNG.uniform(-30, 8, 40)).astype(np.float32))
def test_every_code_comes_back(matrix: np.float32) -> None:
    scales = decode_e4m3(CODES) * matrix
    np.testing.assert_array_equal(block_codes(scales, matrix), CODES)


def test_what_is_no_multiple_has_no_codes() -> None:
    scales = decode_e4m3(CODES) * np.float32(0.001)
    scales[5] = np.nextafter(scales[5], np.float32(1))
    assert block_codes(scales, np.float32(0.001)) is None


def test_a_scale_a_unit_apart_is_found() -> None:
    exact = np.float32(0.0123)
    scales = [decode_e4m3(CODES) * exact, decode_e4m3(CODES[::3]) * exact]
    near = np.nextafter(np.nextafter(exact, np.float32(1)), np.float32(1))
    assert common_scale(scales, near, ["x", "y"]) == exact
    with pytest.raises(UnsupportedError, match="x, y") as caught:
        common_scale(scales, exact * np.float32(1.01), ["x", "y"])
    assert caught.value.kind == "recipe.nvfp4_scale" and caught.value.remedy


def test_rows_of_the_codec_are_multiples_of_its_matrix_scale() -> None:
    values = RNG.normal(size=(16, 64)).astype(np.float32)
    rows = quantize_rows(values, Precision("nvfp4", 16), 5.0)
    codes = block_codes(rows.scales, nvfp4_matrix_scale(5.0))
    assert codes is not None and ((codes > 0) & (codes < 127)).all()
