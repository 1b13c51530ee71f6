"""Stacked weights in rows: the same numbers as concatenating whole tensors, whatever the row range."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows, _widen, read_weight_rows, row_chunks, weight_shape

ATTENTION = "model.layers.1.self_attn."
QKV = CheckpointWeight(tuple(f"{ATTENTION}{part}_proj.weight" for part in "qkv"))
BIAS = CheckpointWeight(tuple(f"{ATTENTION}{part}_proj.bias" for part in "qkv"))
EMBEDDING = CheckpointWeight(("model.embed_tokens.weight",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", [QKV, BIAS, EMBEDDING], ids=["matrices", "biases", "single"])
def test_rows_of_a_stack(tiny_checkpoint: Callable[..., Path], dtype: torch.dtype, weight: CheckpointWeight) -> None:
    path = tiny_checkpoint("biases", dtype=dtype)
    checkpoint, tensors = Checkpoint.open(path), load_file(path / "model.safetensors")
    expected = torch.cat([tensors[name] for name in weight.sources]).float().numpy()
    assert weight_shape(checkpoint, weight) == expected.shape
    count = expected.shape[0]
    # Inside one source, across a border, across two, everything, nothing.
    for start, stop in [(0, 5), (60, 70), (50, count), (0, count), (97, 98), (7, 7)]:
        found = read_weight_rows(checkpoint, weight, start, stop)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[start:stop])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
def test_widening_is_exact_for_every_finite_code(dtype: type) -> None:
    """All codes, zeros, subnormals and both signs included, bit for bit; more of them than one block holds."""
    values = np.arange(65536, dtype=np.uint16).view(dtype)
    values = np.tile(values[np.isfinite(values.astype(np.float32))], 2).reshape(2, -1)
    out = np.empty(values.shape, np.float32)
    _widen(values, out)
    np.testing.assert_array_equal(out.view(np.uint32), values.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("shape", [(10,), (10, 7), (1, 100), (3, 64)])
@pytest.mark.parametrize("elements", [1, 64, 130, 1 << 22])
def test_chunks_cover_every_row_once(shape: tuple[int, ...], elements: int) -> None:
    chunks = list(row_chunks(shape, elements))
    assert [row for start, stop in chunks for row in range(start, stop)] == list(range(shape[0]))
    width = shape[1] if len(shape) > 1 else 1
    assert all((stop - start) * width <= max(elements, width) for start, stop in chunks)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_follows_the_definition(symmetric: bool) -> None:
    """value = (code - zero_point) * scale, group by group, as ONNX DequantizeLinear-21 with a block size says."""
    rng = np.random.default_rng(0)
    low, high = (-8, 8) if symmetric else (0, 16)
    codes = rng.integers(low, high, (4, 64)).astype(np.int8 if symmetric else np.uint8)
    scales = rng.uniform(0.01, 1, (4, 2)).astype(np.float32)
    zeros = None if symmetric else rng.integers(0, 16, (4, 2)).astype(np.uint8)
    rows = QuantizedRows(codes, scales, zeros, Precision("int4", 32, symmetric))
    found = rows.dequantize()
    for (row, column), value in np.ndenumerate(found):
        group = column // 32
        zero = 0 if zeros is None else int(zeros[row, group])
        assert value == np.float32(int(codes[row, column]) - zero) * scales[row, group]
