"""Rows at every precision, against the safetensors library and plain conversions; order and failures of the stream."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration import weight_rows
from calibration.rtn import quantize_rows
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows

QKV = tuple(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
BIAS = tuple(f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv")
RANGES = [(0, 5), (60, 70), (50, 128), (0, 128), (97, 98), (7, 7)]
Factory = Callable[..., Path]


def stacked(path: Path, names: tuple[str, ...]) -> torch.Tensor:
    tensors = load_file(path / "model.safetensors")
    return torch.cat([tensors[name] for name in names])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("names", [QKV, BIAS], ids=["matrices", "biases"])
def test_float_rows_are_torchs_conversion(
    tiny_checkpoint: Factory, dtype: torch.dtype, kind: str, names: tuple[str, ...]
) -> None:
    path = tiny_checkpoint("biases", dtype=dtype)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    expected = stacked(path, names).to(types[kind]).float().numpy()
    rows, weight = WeightRows(Checkpoint.open(path)), CheckpointWeight(names, Precision(kind))
    for start, stop in RANGES:
        found = rows(weight, start, stop)
        assert isinstance(found, np.ndarray)
        assert found.dtype == {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}[kind]
        np.testing.assert_array_equal(found.astype(np.float32), expected[start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", [Precision("int4", 32), Precision("int8", 16, symmetric=False)], ids=str)
def test_quantized_rows_are_those_of_the_whole_tensor(
    tiny_checkpoint: Factory, dtype: torch.dtype, precision: Precision
) -> None:
    path = tiny_checkpoint("biases", dtype=dtype)
    whole = quantize_rows(stacked(path, QKV).float().numpy(), precision)
    rows, weight = WeightRows(Checkpoint.open(path)), CheckpointWeight(QKV, precision)
    for start, stop in RANGES:
        found = rows(weight, start, stop)
        assert isinstance(found, QuantizedRows) and found.precision == precision
        np.testing.assert_array_equal(found.codes, whole.codes[start:stop])
        np.testing.assert_array_equal(found.scales, whole.scales[start:stop])


@pytest.mark.parametrize("elements", [64, 1000, 1 << 20])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_stream_is_complete_and_in_order(
    tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch, elements: int, threads: int
) -> None:
    monkeypatch.setattr(weight_rows, "CHUNK_ELEMENTS", elements)
    rows = WeightRows(Checkpoint.open(tiny_checkpoint("biases")), threads)
    weight = CheckpointWeight(QKV, Precision("int4", 32))
    chunks = list(rows.iterate_rows(weight))
    assert [c[0] for c in chunks] == [0, *(c[1] for c in chunks[:-1])] and chunks[-1][1] == 128
    whole = rows(weight, 0, 128)
    np.testing.assert_array_equal(np.concatenate([part.codes for _, _, part in chunks]), whole.codes)


def test_only_a_few_chunks_are_in_flight(tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_rows, "CHUNK_ELEMENTS", 64)
    started: list[int] = []

    class Counting(WeightRows):
        def __call__(self, weight: CheckpointWeight, start: int, stop: int) -> weight_rows.Rows:
            started.append(start)
            return super().__call__(weight, start, stop)

    stream = Counting(Checkpoint.open(tiny_checkpoint("gqa")), threads=2).iterate_rows(CheckpointWeight(QKV))
    next(stream)
    next(stream)
    stream.close()
    assert len(started) <= 2 + 3, f"{len(started)} of 128 chunks read for two consumed"


def damaged(source: Path, out: Path, name: str, row: int, value: float, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint with one value of one tensor replaced."""
    tensors = {key: tensor.to(dtype).clone() for key, tensor in load_file(source / "model.safetensors").items()}
    tensors[name].view(len(tensors[name]), -1)[row, 0] = value
    out.joinpath("config.json").write_bytes(source.joinpath("config.json").read_bytes())
    save_file(tensors, out / "model.safetensors")
    return Checkpoint.open(out)


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_nan_surfaces_from_the_stream(tiny_checkpoint: Factory, tmp_path: Path, kind: str) -> None:
    checkpoint = damaged(tiny_checkpoint("gqa"), tmp_path, QKV[2], 31, float("nan"), torch.bfloat16)
    precision = Precision(kind, 32 if kind == "int4" else None)
    with pytest.raises(InputError, match=r"v_proj.*NaN"):
        list(WeightRows(checkpoint).iterate_rows(CheckpointWeight(QKV, precision)))


@pytest.mark.parametrize(
    ("kind", "value", "fits"),
    [("fp16", 65519.0, True), ("fp16", -65520.0, False), ("bf16", 3.3895e38, True), ("bf16", -3.4e38, False)],
)
def test_overflow_of_a_half_type_is_refused(
    tiny_checkpoint: Factory, tmp_path: Path, kind: str, value: float, fits: bool
) -> None:
    checkpoint = damaged(tiny_checkpoint("gqa"), tmp_path, QKV[0], 3, value, torch.float32)
    rows, weight = WeightRows(checkpoint), CheckpointWeight(QKV, Precision(kind))
    if fits:
        assert np.isfinite(rows(weight, 0, 8).astype(np.float32)).all()
        return
    with pytest.raises(UnsupportedError, match=f"q_proj.*{kind}") as caught:
        rows(weight, 0, 8)
    assert caught.value.kind == "recipe.overflow" and caught.value.remedy


def test_bfloat16_passes_through_bit_for_bit(tiny_checkpoint: Factory) -> None:
    path = tiny_checkpoint("gqa")
    found = WeightRows(Checkpoint.open(path))(CheckpointWeight(QKV, Precision("bf16")), 0, 128)
    expected = stacked(path, QKV).view(torch.uint16).numpy()
    np.testing.assert_array_equal(found.view(np.uint16), expected)
