"""The external data file: exact bytes, alignment, determinism, streaming, a full disk."""

import errno
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from calibration.codecs import unpack_nibbles
from exporter.core.canonical import CheckpointWeight, RotaryTable
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import InputError
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from targets import external_data
from targets.external_data import Region
from targets.onnxruntime.weight_file import QuantizedMatrix, WeightFile
from tests.targets.engines import RECIPES, build, build_source

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint("gqa"))


class Codes:
    """A row reader whose integers are known, asked for in small chunks and recorded."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, weight: CheckpointWeight, start: int, stop: int) -> np.ndarray | QuantizedRows:
        self.asked.append((start, stop))
        rows = slice(start, stop)
        if not weight.precision.is_integer:
            return self.values()[rows].astype(ml_dtypes.bfloat16 if weight.precision.kind == "bf16" else np.float32)
        return QuantizedRows(
            self.codes(weight.precision)[rows],
            self.values()[rows, : 128 // weight.precision.group_size],
            None if weight.precision.symmetric else self.zero_points(weight.precision)[rows],
            weight.precision,
        )

    @staticmethod
    def values() -> np.ndarray:
        return np.arange(64 * 128, dtype=np.float32).reshape(64, 128) / 64

    @staticmethod
    def codes(precision: Precision) -> np.ndarray:
        span = 1 << precision.bits
        codes = np.arange(64 * 128).reshape(64, 128) % span
        return codes.astype(np.uint8) if not precision.symmetric else (codes - span // 2).astype(np.int8)

    @staticmethod
    def zero_points(precision: Precision) -> np.ndarray:
        groups = 128 // precision.group_size
        return (np.arange(64 * groups).reshape(64, groups) % (1 << precision.bits)).astype(np.uint8)


def region(path: Path, part: Region) -> np.ndarray:
    return np.frombuffer(path.read_bytes()[part.offset : part.offset + part.length], np.uint8)


@pytest.mark.parametrize("group", [16, 128])
@pytest.mark.parametrize(
    ("kind", "symmetric"), [("int4", True), ("int4", False), ("int6", True), ("int8", True), ("int8", False)]
)
def test_integers_lie_as_matmul_nbits_reads_them(checkpoint, tmp_path, monkeypatch, kind, symmetric, group):
    monkeypatch.setattr(external_data, "row_chunks", lambda shape: [(0, 7), (7, 50), (50, 64)])
    precision, reader = Precision(kind, group, symmetric), Codes()
    weight = CheckpointWeight((NAME,), precision)
    with WeightFile(tmp_path / "data", checkpoint, reader) as file:
        matrix = file.quantized("w", weight)
        assert file.quantized("again", weight) is matrix
    assert reader.asked == [(0, 7), (7, 50), (50, 64)]
    assert isinstance(matrix, QuantizedMatrix)
    codes, bits = region(file.path, matrix.codes), 4 if kind == "int4" else 8
    if bits == 4:
        codes = unpack_nibbles(codes, 64 * 128, signed=False)
    offset = 1 << (bits - 1) if symmetric else 0
    np.testing.assert_array_equal(codes.reshape(64, 128), reader.codes(precision).astype(int) + offset)
    scales = region(file.path, matrix.scales).view(np.float32).reshape(64, -1)
    np.testing.assert_array_equal(scales, reader.values()[:, : 128 // group])
    if symmetric:
        assert matrix.zero_points is None
    else:
        zeros = region(file.path, matrix.zero_points).reshape(64, -1)
        if bits == 4:  # each row starts on a byte: one group leaves half of it empty
            zeros = unpack_nibbles(zeros, 128 // group, signed=False)
        np.testing.assert_array_equal(zeros, reader.zero_points(precision))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_floats_lie_as_they_are(checkpoint, tmp_path, kind):
    weight = CheckpointWeight((NAME,), Precision(kind))
    with WeightFile(tmp_path / "data", checkpoint, Codes()) as file:
        tensor = file.floats("w", weight)
        assert file.floats("w again", weight).offset == tensor.offset
    np.testing.assert_array_equal(tensor.numpy(), Codes()(weight, 0, 64))


def test_regions_start_on_pages_and_are_counted(checkpoint, tmp_path):
    table = RotaryTable("cos", (1.0, 0.5, 0.25), 11)
    with WeightFile(tmp_path / "data", checkpoint, Codes()) as file:
        first = file.table("cos", table)
        second = file.floats("w", CheckpointWeight((NAME,)))
        assert file.table("cos", table).offset == first.offset
    assert (first.offset, second.offset) == (0, 4096)
    assert file.weights_bytes == 11 * 3 * 4 + 64 * 128 * 4
    np.testing.assert_array_equal(first.numpy(), table.values())


def test_rows_of_another_precision_are_a_fault(checkpoint, tmp_path):
    def doubles(weight: CheckpointWeight, start: int, stop: int) -> np.ndarray:
        return np.zeros((stop - start, 128))

    with WeightFile(tmp_path / "data", checkpoint, doubles) as file:
        with pytest.raises(TypeError, match="w are not float32"):
            file.floats("w", CheckpointWeight((NAME,)))
        with pytest.raises(TypeError, match="int4/g32"):
            file.quantized("w", CheckpointWeight((NAME,), Precision("int4", 32)))


def test_two_builds_give_the_same_bytes(tiny_checkpoint, tmp_path):
    source = build_source(tiny_checkpoint("tied"), RECIPES["mixed"])
    first, second = build(source, tmp_path / "a"), build(source, tmp_path / "b")
    for name in first.result.files:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
    assert str(tmp_path).encode() not in (first.path / "model.onnx").read_bytes()


def test_a_full_disk_says_so(tiny_checkpoint, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError) as error:
        build(build_source(tiny_checkpoint("gqa"), RECIPES["int4"]), tmp_path)
    assert error.value.kind == "output.full"
    assert "No space left" in error.value.message


def test_an_unwritable_directory_says_so(tiny_checkpoint, tmp_path):
    (tmp_path / "model.onnx.data").mkdir()
    with pytest.raises(InputError) as error:
        build(build_source(tiny_checkpoint("gqa"), RECIPES["fp32"]), tmp_path)
    assert error.value.kind == "output.write"
