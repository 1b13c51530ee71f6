"""Files of parameters: what was written comes back, other readers agree, bytes depend on the content alone."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file as load_torch

from calibration.qparams import QParams
from calibration.qparams_writer import QParamsWriter
from calibration.transformed import TransformedCheckpoint, with_transforms
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import InputError
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from tests.calibration.qparams_samples import (
    DATA,
    PRECISIONS,
    RECIPE,
    TENSOR,
    TRANSFORMS,
    add_statistics,
    random_codes,
    write_sample,
)

Factory = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Factory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint("gqa"))


@pytest.fixture(scope="module")
def sample(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> QParams:
    return write_sample(tmp_path_factory.mktemp("qparams") / "sample.qparams", checkpoint)


def test_facts_come_back(sample: QParams, checkpoint: Checkpoint) -> None:
    found = QParams.open(sample.path)
    assert found.source_digest == checkpoint.digest and found.recipe == RECIPE and found.data == DATA
    assert found.transforms == TRANSFORMS and found.part is None
    assert found.reports["model.layers.1.mlp.up_proj"] == {"damping": 0.01, "order": "descending"}
    assert found.digest == hashlib.sha256(sample.path.read_bytes()).hexdigest()
    found.check(checkpoint)
    found.check(with_transforms(checkpoint, found.transforms))


@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
def test_codes_come_back(sample: QParams, precision: Precision) -> None:
    written = random_codes(precision)
    for start, stop in ((0, 128), (3, 10), (127, 128), (5, 5)):
        found = sample.rows(TENSOR, precision, start, stop)
        assert found is not None and found.precision == precision
        assert found.codes.dtype == written.codes.dtype and found.scales.dtype == np.float32
        np.testing.assert_array_equal(found.codes, written.codes[start:stop])
        np.testing.assert_array_equal(found.scales, written.scales[start:stop])
        if written.zero_points is None:
            assert found.zero_points is None
        else:
            np.testing.assert_array_equal(found.zero_points, written.zero_points[start:stop])


def test_activations_do_not_change_codes(sample: QParams) -> None:
    precision = Precision("int4", 32, activations="int8/token")
    found = sample.rows(TENSOR, precision, 0, 4)
    assert found is not None and found.precision == precision
    np.testing.assert_array_equal(found.codes, random_codes(PRECISIONS[0]).codes[:4])


def test_what_the_file_lacks_is_none(sample: QParams) -> None:
    assert sample.rows(TENSOR, Precision("int4", 64), 0, 4) is None
    assert sample.rows("model.layers.1.mlp.up_proj.weight", Precision("int4", 32), 0, 4) is None
    assert sample.rows(TENSOR, Precision("bf16"), 0, 4) is None


def test_statistics_come_back(sample: QParams) -> None:
    for module in ("q_proj", "k_proj", "v_proj"):
        found = sample.input_amax(f"model.layers.1.self_attn.{module}")
        np.testing.assert_array_equal(found, np.linspace(1, 3, 64).astype(np.float32))
    assert sample.input_amax("model.layers.7.mlp.up_proj") is None
    assert sample.input_scale("model.layers.1.self_attn.k_proj", "int8/tensor") == np.float32(3) / np.float32(127)
    assert sample.input_scale("lm_head", "fp8/tensor") == np.float32(3) / np.float32(448)
    # The largest code of E2M1 times the largest E4M3 scale of a block: modelopt's NVFP4QTensor has the same.
    assert sample.input_scale("lm_head", "nvfp4/tensor") == np.float32(3) / np.float32(2688)
    # An observer's limit goes before the largest value.
    assert sample.input_scale("model.layers.0.mlp.down_proj", "fp8/tensor") == np.float32(1.5) / np.float32(448)
    keys, values = sample.kv_amax(0) or (None, None)
    np.testing.assert_array_equal(keys, np.linspace(0, 5, 32).astype(np.float32))
    np.testing.assert_array_equal(values, np.linspace(0, 2, 32).astype(np.float32))
    assert sample.kv_scales(1, "int8") == (np.float32(5) / np.float32(127), np.float32(2) / np.float32(127))
    assert sample.kv_scales(1, "fp8") == (np.float32(5) / np.float32(448), np.float32(2) / np.float32(448))
    assert sample.kv_amax(2) is None


def test_missing_statistics_are_named(sample: QParams) -> None:
    with pytest.raises(InputError, match=r"layers\.9") as found:
        sample.input_scale("model.layers.9.mlp.up_proj", "int8/tensor")
    assert found.value.kind == "qparams.input_scale"
    with pytest.raises(InputError, match="layer 9") as found:
        sample.kv_scales(9, "fp8")
    assert found.value.kind == "qparams.kv_scale"
    with pytest.raises(ValueError):
        sample.input_amax("model.norm")


def test_an_input_that_was_always_zero_has_the_scale_one(tmp_path: Path) -> None:
    with QParamsWriter(tmp_path / "q", source_digest="0" * 64, recipe=RECIPE) as writer:
        writer.add_input_amax(0, "mlp_input", np.zeros(64))
        writer.add_input_amax(1, "mlp_input", np.full(64, 1e-45, np.float32))
        found = writer.finish()
    assert found.input_scale("model.layers.0.mlp.up_proj", "int8/tensor") == 1.0
    assert found.input_scale("model.layers.1.mlp.up_proj", "fp8/tensor") > 0


@pytest.mark.parametrize("library", [load_numpy, load_torch], ids=["numpy", "torch"])
def test_the_safetensors_library_reads_it(sample: QParams, library: Callable[[Path], dict[str, object]]) -> None:
    """An independent reader, with decoding written out from docs/qparams.md."""
    tensors = {name: np.asarray(value) for name, value in library(sample.path).items()}
    with safetensors.safe_open(sample.path, "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "enginesmith.qparams" and metadata["version"] == "1"
    assert [entry["kind"] for entry in json.loads(metadata["transforms"])][:3] == [
        "fold_norms",
        "rotate_residual",
        "rotate_heads",
    ]
    np.testing.assert_array_equal(tensors["transforms.3.scale"], np.linspace(0.5, 2, 128, dtype=np.float32))
    for precision in PRECISIONS:
        key = f"{TENSOR}:{precision.describe()}"
        decoded = decode(precision, tensors[f"{key}.codes"], tensors.get(f"{key}.zero_points"))
        scales = np.repeat(tensors[f"{key}.scales"], 64 // tensors[f"{key}.scales"].shape[1], axis=1)
        np.testing.assert_array_equal(decoded * scales, random_codes(precision).dequantize(), err_msg=key)


def decode(precision: Precision, codes: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    if precision.bits == 4:
        codes = np.stack([codes % 16, codes // 16], axis=-1).reshape(len(codes), -1)
    match precision.kind:
        case "int4" if precision.symmetric:
            codes = np.where(codes > 7, codes.astype(np.int8) - 16, codes)
        case "fp8":
            return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        case "nvfp4" | "mxfp4":
            return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        case "nf4":
            return NF4[codes]
    values = codes.astype(np.float32)
    return values if zeros is None else values - np.repeat(zeros, codes.shape[1] // zeros.shape[1], axis=1)


# QLoRA, appendix E, as bitsandbytes prints them.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def test_bytes_depend_on_the_content_alone(sample: QParams, checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = write_sample(tmp_path / "other", checkpoint, reverse=True)
    assert other.digest == sample.digest


def test_parts_make_the_same_file(sample: QParams, checkpoint: Checkpoint, tmp_path: Path) -> None:
    facts = {"source_digest": checkpoint.digest, "recipe": RECIPE, "data": DATA}
    names = ("transforms", "codes", "layer 0", "layer 1")
    for number, name in enumerate(names):
        with QParamsWriter(tmp_path / name, **facts, part=name) as writer:
            if name == "transforms":
                for transform in TRANSFORMS:
                    writer.add_transform(transform)
            elif name == "codes":
                whole = QParams.open(sample.path)
                for stored in whole.codes.values():
                    rows = whole.rows(stored.tensor, stored.precision, 0, stored.codes.shape[0])
                    assert rows is not None
                    writer.add_codes(stored.tensor, rows)
                writer.add_input_amax(None, "head_input", np.full(64, 3.0))
            else:
                add_statistics(writer, number - 2)
            assert writer.finish().part == name
    with QParamsWriter(tmp_path / "whole", **facts) as writer:
        for name in names:
            writer.add_part(QParams.open(tmp_path / name))
        assert writer.finish().digest == sample.digest
    with pytest.raises(InputError) as found:
        QParams.open(tmp_path / "layer 0").check(checkpoint)
    assert found.value.kind == "qparams.part"


def test_stored_codes_go_before_rounding(checkpoint: Checkpoint, sample: QParams) -> None:
    transformed = with_transforms(checkpoint, sample.transforms)
    rows = WeightRows(transformed, 1, sample)
    weight = CheckpointWeight((f"{TENSOR.replace('up', 'gate')}", TENSOR), Precision("int4", 32))
    found = rows(weight, 120, 140)
    assert isinstance(found, QuantizedRows)
    np.testing.assert_array_equal(found.codes[8:], random_codes(Precision("int4", 32)).codes[:12])
    plain = WeightRows(transformed, 1)(weight, 120, 140)
    assert isinstance(plain, QuantizedRows)
    np.testing.assert_array_equal(found.codes[:8], plain.codes[:8])
    assert (found.codes[8:] != plain.codes[8:]).any()


def test_a_block_left_early_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), QParamsWriter(tmp_path / "q", source_digest="0" * 64, recipe=RECIPE) as w:
        w.add_codes(TENSOR, random_codes(PRECISIONS[0]))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q"
    path.write_bytes(b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with QParamsWriter(path, source_digest="0" * 64, recipe=RECIPE) as writer, pytest.raises(InputError) as found:
        writer.add_codes(TENSOR, random_codes(PRECISIONS[0]))
        writer.finish()
    assert found.value.kind == "output.full"
    assert [file.name for file in tmp_path.iterdir()] == ["q"] and path.read_bytes() == b"before"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError) as found:
        QParamsWriter(tmp_path / "nowhere" / "q", source_digest="0" * 64, recipe=RECIPE)
    assert found.value.kind == "output.write"


def test_the_writer_refuses_what_the_reader_would(tmp_path: Path) -> None:
    good = random_codes(PRECISIONS[0])
    bad = QuantizedRows(
        good.codes, np.where(good.scales == good.scales[3, 1], np.nan, good.scales), None, PRECISIONS[0]
    )
    with QParamsWriter(tmp_path / "q", source_digest="0" * 64, recipe=RECIPE) as writer:
        with pytest.raises(InputError) as found:
            writer.add_codes(TENSOR, bad)
        assert found.value.kind == "qparams.scale"
        writer.add_input_amax(0, "mlp_input", np.ones(64))
        with pytest.raises(ValueError, match="twice"):
            writer.add_input_amax(0, "mlp_input", np.ones(64))
        writer.add_codes("lm_head.weight", good)
        with pytest.raises(ValueError, match="twice"):
            writer.add_codes("lm_head.weight", good)
        with pytest.raises(ValueError):
            writer.add_report("x", {"loss": float("nan")})


def test_rows_are_read_without_the_rest(sample: QParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of codes costs its own bytes: files of many GB are served from little memory."""
    read: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], position: int) -> int:
        read.append(preadv(descriptor, buffers, position))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    sample.rows(TENSOR, Precision("int4", 32), 10, 12)
    assert sum(read) == 2 * (32 + 8)


def test_a_transformed_checkpoint_is_checked_by_its_original(sample: QParams, checkpoint: Checkpoint) -> None:
    transformed = with_transforms(checkpoint, sample.transforms)
    assert isinstance(transformed, TransformedCheckpoint)
    sample.check(transformed)
    assert torch.equal(torch.from_numpy(transformed.read("model.norm.weight")), torch.ones(64))
