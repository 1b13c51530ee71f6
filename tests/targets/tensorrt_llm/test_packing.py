"""Bytes of codes against the packages whose formats they are."""

import numpy as np
import pytest
import torch

from targets.tensorrt_llm.packing import pack_columns, pack_row_pairs, pack_words
from targets.tensorrt_llm.stored_checks import e2m1

RNG = np.random.default_rng(3)


def test_pairs_of_rows_as_modelopt_packs_them() -> None:
    quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")
    codes = RNG.integers(-8, 8, (10, 48), dtype=np.int8)
    scales = torch.from_numpy(RNG.uniform(0.1, 3, (10, 3)).astype(np.float32))
    weight = torch.from_numpy(codes).float() * scales.repeat_interleave(16, 1)
    expected = quant_utils.pack_int4_in_uint8(weight, scales, 16)
    np.testing.assert_array_equal(pack_row_pairs(codes), expected.numpy())


@pytest.mark.parametrize(("bits", "width"), [(4, 64), (4, 44), (8, 64), (8, 30)])
def test_words_as_compressed_tensors_packs_them(bits: int, width: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    half = 1 << (bits - 1)
    codes = RNG.integers(-half, half, (6, width)).astype(np.int8)
    expected = helpers.pack_to_int32(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(pack_words(codes, bits), expected.numpy())
    again = helpers.unpack_from_int32(torch.from_numpy(pack_words(codes, bits).copy()), bits, torch.Size(codes.shape))
    np.testing.assert_array_equal(again.numpy(), codes)


def test_columns_as_both_packages_unpack_them() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    codes = RNG.integers(0, 16, (4, 32), dtype=np.uint8)
    packed = pack_columns(codes)
    found = helpers.unpack_fp4_from_uint8(torch.from_numpy(packed), 4, 32).float().numpy()
    np.testing.assert_array_equal(e2m1(packed), found)
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    table = qtensor.e2m1_values.float().numpy()
    np.testing.assert_array_equal(table[codes], found)
