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
from exporter.core.recipe import TENSOR, Precision, all_precisions
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


PER_MATRIX = [Precision("fp8", TENSOR), Precision("nvfp4", 16)]


@pytest.mark.parametrize("precision", PER_MATRIX, ids=Precision.describe)
def test_tensors_of_a_stack_have_a_maximum_each_in_fp8_and_one_in_nvfp4(
    tiny_checkpoint: Factory, precision: Precision
) -> None:
    path = tiny_checkpoint("biases")
    tensors = {name: load_file(path / "model.safetensors")[name].float().numpy() for name in QKV}
    shared = max(float(np.abs(values).max()) for values in tensors.values())
    amax = shared if precision.kind == "nvfp4" else None
    parts = [quantize_rows(tensors[name], precision, amax) for name in QKV]
    rows, weight = WeightRows(Checkpoint.open(path)), CheckpointWeight(QKV, precision)
    for start, stop in RANGES:
        found = rows(weight, start, stop)
        assert isinstance(found, QuantizedRows)
        np.testing.assert_array_equal(found.codes, np.concatenate([part.codes for part in parts])[start:stop])
        np.testing.assert_array_equal(found.scales, np.concatenate([part.scales for part in parts])[start:stop])


def test_the_maximum_is_read_once_for_all_threads(tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_rows, "CHUNK_ELEMENTS", 640)
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    read: list[tuple[str, int, int]] = []
    original = Checkpoint.read_rows

    def counting(self: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
        read.append((name, start, stop))
        return original(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read_rows", counting)
    list(WeightRows(checkpoint, threads=4).iterate_rows(CheckpointWeight(QKV, Precision("nvfp4", 16))))
    by_tensor = {name: sum(stop - start for each, start, stop in read if each == name) for name in QKV}
    assert by_tensor == {name: 2 * checkpoint.tensors[name].shape[0] for name in QKV}, "once to measure, once to round"


class Stored:
    """Codes of one tensor at one precision, each value of a row its number; notes what it is asked."""

    def __init__(self, tensor: str, precision: Precision) -> None:
        self.tensor, self.precision = tensor, precision
        self.asked: list[tuple[str, Precision]] = []

    def rows(self, tensor: str, precision: Precision, start: int, stop: int) -> QuantizedRows | None:
        self.asked.append((tensor, precision))
        if (tensor, precision) != (self.tensor, self.precision):
            return None
        codes = np.repeat(np.arange(start, stop, dtype=np.int8)[:, None], 64, axis=1)
        return QuantizedRows(codes, np.full((stop - start, 2), 0.5, np.float32), None, precision)


def test_stored_codes_go_first_and_others_are_rounded(tiny_checkpoint: Factory) -> None:
    """The codes of k are stored, those of q and v are not; what the recipe asks of activations makes no difference."""
    path = tiny_checkpoint("gqa")
    asked = Precision("int4", 32, activations="int8/token")
    stored = Stored(QKV[1], asked.weight_only)
    rows = WeightRows(Checkpoint.open(path), stored=stored)
    found = rows(CheckpointWeight(QKV, asked), 0, 128)
    assert isinstance(found, QuantizedRows) and found.precision == asked
    np.testing.assert_array_equal(found.codes[64:96, 0], np.arange(32))
    plain = WeightRows(Checkpoint.open(path))(CheckpointWeight(QKV, asked), 0, 128)
    assert isinstance(plain, QuantizedRows)
    for part in (slice(0, 64), slice(96, 128)):
        np.testing.assert_array_equal(found.codes[part], plain.codes[part])
        np.testing.assert_array_equal(found.scales[part], plain.scales[part])
    assert {name for name, _ in stored.asked} == set(QKV)
    assert all(precision == asked.weight_only for _, precision in stored.asked)


def test_codes_of_another_precision_are_not_taken(tiny_checkpoint: Factory) -> None:
    path = tiny_checkpoint("gqa")
    stored = Stored(QKV[0], Precision("int4", 32))
    for precision in (Precision("int4", 16), Precision("int8", 32), Precision("nf4", 32)):
        weight = CheckpointWeight(QKV[:1], precision)
        found = WeightRows(Checkpoint.open(path), stored=stored)(weight, 0, 64)
        plain = WeightRows(Checkpoint.open(path))(weight, 0, 64)
        assert isinstance(found, QuantizedRows) and isinstance(plain, QuantizedRows)
        np.testing.assert_array_equal(found.codes, plain.codes)


@pytest.mark.parametrize("precision", [Precision("int4", 32, symmetric=False), Precision("nvfp4", 16)], ids=str)
def test_an_empty_range_has_no_rows(tiny_checkpoint: Factory, precision: Precision) -> None:
    rows = WeightRows(Checkpoint.open(tiny_checkpoint("gqa")), stored=Stored(QKV[0], Precision("int4", 32)))
    found = rows(CheckpointWeight(QKV, precision), 7, 7)
    assert isinstance(found, QuantizedRows) and found.codes.shape == (0, 64)
    assert (found.zero_points is None) == precision.symmetric


@pytest.mark.parametrize("precision", [p for p in all_precisions() if p.is_coded and not p.activations], ids=str)
def test_every_precision_is_that_of_each_whole_tensor(tiny_checkpoint: Factory, precision: Precision) -> None:
    path = tiny_checkpoint("gqa", hidden_size=256)
    rows = WeightRows(Checkpoint.open(path))(CheckpointWeight(QKV, precision), 250, 400)
    assert isinstance(rows, QuantizedRows) and rows.scales.shape == (150, precision.groups(256))
    tensors = {name: load_file(path / "model.safetensors")[name].float().numpy() for name in QKV}
    # One scale of nvfp4 serves all three.
    amax = max(float(np.abs(values).max()) for values in tensors.values()) if precision.kind == "nvfp4" else None
    parts = [quantize_rows(tensors[name], precision, amax).dequantize() for name in QKV]
    np.testing.assert_array_equal(rows.dequantize(), np.concatenate(parts)[250:400])
