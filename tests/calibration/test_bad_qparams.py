"""Damaged, foreign and misfitting files of parameters: refused with exit code 2 and a reason, never read as numbers."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.qparams import QParams
from calibration.qparams_format import FORMAT
from calibration.qparams_writer import QParamsWriter
from calibration.transforms import ScaleInput
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import InputError
from exporter.core.recipe import Precision
from tests.calibration.qparams_samples import PRECISIONS, RECIPE, TENSOR, random_codes, write_sample
from tests.core.raw_safetensors import entry, file_bytes, split

Factory = Callable[..., Path]
Header = dict[str, Any]
UP = "model.layers.0.mlp.up_proj.weight:int4/g32"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Factory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint("gqa"))


@pytest.fixture(scope="module")
def sample(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("qparams") / "sample", checkpoint).path


def refused(path: Path) -> str:
    """The kind of the refusal."""
    with pytest.raises(InputError) as found:
        QParams.open(path)
    assert found.value.exit_code == 2 and found.value.remedy
    return found.value.kind


def changed(sample: Path, out: Path, change: Callable[[Header], None]) -> Path:
    """The sample with another header; no bytes move."""
    header, data = split(sample)
    change(header)
    out.write_bytes(file_bytes(header, data))
    return out


def metadata(name: str, value: object) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        header["__metadata__"].update({name: text})

    return change


def without(name: str) -> Callable[[Header], None]:
    return lambda header: header["__metadata__"].pop(name)


def edited(name: str, change: Callable[[Any], object]) -> Callable[[Header], None]:
    """One JSON entry of the metadata, changed."""

    def apply(header: Header) -> None:
        value = json.loads(header["__metadata__"][name])
        changed = change(value)
        header["__metadata__"][name] = json.dumps(value if changed is None else changed)

    return apply


def renamed(old: str, new: str) -> Callable[[Header], None]:
    return lambda header: header.update({new: header.pop(old)})


def described(name: str, **changes: object) -> Callable[[Header], None]:
    return lambda header: header[name].update(changes)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("qparams.format", without("format")),
        ("qparams.format", metadata("format", "pt")),
        ("qparams.version", metadata("version", "2")),
        ("qparams.version", metadata("version", "0")),
        ("qparams.version", metadata("version", "one")),
        ("qparams.version", metadata("version", "9" * 5000)),
        ("qparams.version", without("version")),
        ("qparams.metadata", without("source_digest")),
        ("qparams.metadata", metadata("source_digest", "abc")),
        ("qparams.metadata", metadata("source_digest", "A" * 64)),
        ("qparams.metadata", without("recipe")),
        ("qparams.metadata", metadata("recipe", "{")),
        ("qparams.metadata", metadata("recipe", '{"name": "a", "name": "b"}')),
        ("qparams.metadata", metadata("recipe", '{"name": NaN}')),
        ("recipe.json", metadata("recipe", "[]")),
        ("recipe.json", edited("recipe", lambda recipe: recipe.update(extra=1))),
        ("recipe.precision", edited("recipe", lambda recipe: recipe["linear"].update(kind="int3"))),
        ("qparams.metadata", metadata("data", [])),
        ("qparams.metadata", metadata("data", {"tokens": 1.5})),
        ("qparams.metadata", metadata("reports", {"a": 1})),
        ("qparams.metadata", metadata("unknown", "1")),
        ("qparams.metadata", metadata("shared_scales", [])),
        ("qparams.transforms", metadata("transforms", {})),
        ("qparams.transforms", metadata("transforms", [])),
        ("qparams.transforms", edited("transforms", lambda all: all[0].update(kind="unfold"))),
        ("qparams.transforms", edited("transforms", lambda all: all[0].update(seed=1))),
        ("qparams.transforms", edited("transforms", lambda all: all[1].update(seed=-1))),
        ("qparams.transforms", edited("transforms", lambda all: all[1].update(seed=True))),
        ("qparams.transforms", edited("transforms", lambda all: all[3].update(layer=0.0))),
        ("qparams.transforms", edited("transforms", lambda all: all.reverse())),
        ("qparams.transforms", edited("transforms", lambda all: [3])),
        ("transform.point", edited("transforms", lambda all: all[3].update(point="head_input"))),
        ("qparams.tensor", renamed(f"{UP}.codes", f"{UP}.values")),
        ("qparams.tensor", renamed(f"{UP}.codes", "model.layers.0.mlp.up_proj.weight:int4/g99.codes")),
        ("qparams.tensor", renamed(f"{UP}.codes", "model.layers.0.mlp.up_proj.weight:int4/g128.codes")),
        ("qparams.tensor", renamed("head_input.amax", "tail_input.amax")),
        ("qparams.tensor", renamed("head_input.amax", "model.layers.00000000000000001.mlp_input.amax")),
        ("qparams.tensor", described("head_input.amax", shape=[8, 8])),
        ("qparams.tensor", described(f"{UP}.codes", dtype="I8")),
        ("qparams.tensor", described(f"{UP}.codes", shape=[64, 64])),
        ("qparams.tensor", described(f"{UP}.scales", shape=[256, 1])),
        ("qparams.dtype", described(f"{UP}.codes", dtype="F16")),
        ("qparams.header", described(f"{UP}.codes", shape=[128, 31])),
        ("qparams.header", described(f"{UP}.codes", shape=[128, -32])),
        ("qparams.header", lambda header: header.update(__metadata__={"format": 3})),
        ("qparams.format", lambda header: header.update(__metadata__=None)),
    ],
)
def test_headers_that_lie(sample: Path, tmp_path: Path, kind: str, change: Callable[[Header], None]) -> None:
    assert refused(changed(sample, tmp_path / "q", change)) == kind


def test_other_files(tmp_path: Path, tiny_checkpoint: Factory) -> None:
    (tmp_path / "text").write_text("not a file of parameters, but long enough for a header")
    (tmp_path / "empty").touch()
    assert refused(tmp_path / "text").startswith("qparams.")
    assert refused(tmp_path / "empty") == "qparams.truncated"
    assert refused(tmp_path / "missing") == refused(tmp_path) == "qparams.missing"
    # A checkpoint is a safetensors file too, of other dtypes and without our metadata.
    assert refused(tiny_checkpoint("gqa") / "model.safetensors").startswith("qparams.")
    (tmp_path / "bare").write_bytes(file_bytes({"a": entry("F32", [1], 0, 4)}, bytes(4)))
    assert refused(tmp_path / "bare") == "qparams.format"


def test_every_shorter_file_is_refused(sample: Path, tmp_path: Path) -> None:
    whole = sample.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for size in (*range(10), length, length + 7, length + 8, len(whole) // 2, len(whole) - 1):
        (tmp_path / "q").write_bytes(whole[:size])
        assert refused(tmp_path / "q").startswith("qparams."), size
    (tmp_path / "q").write_bytes(whole + b"\0")
    assert refused(tmp_path / "q") == "qparams.trailing"


def test_damaged_bytes_of_the_header_end_in_a_refusal_or_sound_values(sample: Path, tmp_path: Path) -> None:
    whole = bytearray(sample.read_bytes())
    length = struct.unpack("<Q", whole[:8])[0]
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(8, 8 + length, 3):
            damaged[place] = random.integers(32, 127)
        (tmp_path / "q").write_bytes(damaged)
        try:
            found = QParams.open(tmp_path / "q")
        except InputError as error:
            assert error.kind.startswith(("qparams.", "recipe.", "transform."))
        else:
            assert found.recipe.linear.kind and found.tensors


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, 3.0])
@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
def test_scales_that_the_format_forbids(sample: Path, tmp_path: Path, precision: Precision, value: float) -> None:
    signed = precision.is_integer and precision.symmetric
    allowed = np.isfinite(value) and (value > 0 or (signed and value < 0)) and precision.kind != "mxfp4"
    path = planted(sample, tmp_path / "q", f"{TENSOR}:{precision.describe()}.scales", np.float32(value).tobytes())
    found = QParams.open(path)
    if allowed:
        rows = found.rows(TENSOR, precision, 0, 1)
        assert rows is not None and rows.scales[0, 0] == np.float32(value)
        return
    with pytest.raises(InputError) as refusal:
        found.rows(TENSOR, precision, 0, 1)
    assert refusal.value.kind == "qparams.scale" and TENSOR in refusal.value.message


@pytest.mark.parametrize(
    ("precision", "part", "byte"),
    [
        (Precision("fp8", 0), "codes", 0x7F),
        (Precision("fp8", -1), "codes", 0xFF),
        (Precision("int6", 32), "codes", 32),
        (Precision("int6", 32), "codes", 0x80),
        (Precision("int4", 16, symmetric=False), "zero_points", 16),
    ],
    ids=str,
)
def test_codes_that_the_format_forbids(
    sample: Path, tmp_path: Path, precision: Precision, part: str, byte: int
) -> None:
    path = planted(sample, tmp_path / "q", f"{TENSOR}:{precision.describe()}.{part}", bytes([byte]))
    with pytest.raises(InputError) as found:
        QParams.open(path).rows(TENSOR, precision, 0, 1)
    assert found.value.kind == "qparams.codes"


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_magnitudes_that_are_none(sample: Path, tmp_path: Path, value: float) -> None:
    path = planted(sample, tmp_path / "q", "model.layers.0.attention_input.amax", np.float32(value).tobytes())
    with pytest.raises(InputError) as found:
        QParams.open(path).input_scale("model.layers.0.self_attn.q_proj", "int8/tensor")
    assert found.value.kind == "qparams.amax"


def test_scales_of_transforms_are_checked_on_opening(sample: Path, tmp_path: Path) -> None:
    path = planted(sample, tmp_path / "q", "transforms.3.scale", np.float32(0).tobytes())
    assert refused(path) == "transform.scale"


def planted(sample: Path, out: Path, tensor: str, data: bytes) -> Path:
    """The sample with the first bytes of a tensor overwritten."""
    header, body = split(sample)
    first = header[tensor]["data_offsets"][0]
    out.write_bytes(file_bytes(header, body[:first] + data + body[first + len(data) :]))
    return out


def test_parameters_of_another_checkpoint(sample: Path, tiny_checkpoint: Factory) -> None:
    with pytest.raises(InputError) as found:
        QParams.open(sample).check(Checkpoint.open(tiny_checkpoint("mha")))
    assert found.value.kind == "qparams.other_checkpoint" and found.value.exit_code == 2


@pytest.mark.parametrize("shape", ["mha", "head_dim", "tied", "odd_vocabulary"])
def test_shapes_of_another_architecture(sample: Path, tiny_checkpoint: Factory, shape: str) -> None:
    """A file that claims a checkpoint's digest still has to fit it; folded norms untie the head of `tied`."""
    checkpoint = Checkpoint.open(tiny_checkpoint(shape))
    claimed = replace(QParams.open(sample), source_digest=checkpoint.digest)
    if shape == "tied":
        claimed.check(checkpoint)
        return
    with pytest.raises(InputError) as found:
        claimed.check(checkpoint)
    assert found.value.kind in ("qparams.shape", "transform.shape")


@pytest.mark.parametrize(
    ("kind", "add"),
    [
        (
            "qparams.shape",
            lambda writer: writer.add_codes("model.layers.2.mlp.up_proj.weight", random_codes(PRECISIONS[0])),
        ),
        ("qparams.shape", lambda writer: writer.add_codes("model.norm.weight", random_codes(PRECISIONS[0]))),
        ("qparams.shape", lambda writer: writer.add_codes(TENSOR, random_codes(PRECISIONS[0], rows=64))),
        ("qparams.shape", lambda writer: writer.add_input_amax(2, "mlp_input", np.ones(64))),
        ("qparams.shape", lambda writer: writer.add_input_amax(0, "mlp_hidden", np.ones(64))),
        ("qparams.shape", lambda writer: writer.add_input_amax(None, "head_input", np.ones(63))),
        ("qparams.shape", lambda writer: writer.add_kv_amax(0, np.ones(32), np.ones(64))),
        ("transform.layer", lambda writer: writer.add_transform(ScaleInput(2, "mlp_input", np.ones(64)))),
        ("transform.shape", lambda writer: writer.add_transform(ScaleInput(0, "mlp_input", np.ones(63)))),
    ],
)
def test_what_the_checkpoint_does_not_have(
    checkpoint: Checkpoint, tmp_path: Path, kind: str, add: Callable[[QParamsWriter], None]
) -> None:
    with QParamsWriter(tmp_path / "q", source_digest=checkpoint.digest, recipe=RECIPE) as writer:
        add(writer)
        found = writer.finish()
    with pytest.raises(InputError) as refusal:
        found.check(checkpoint)
    assert refusal.value.kind == kind


def test_the_format_has_this_name() -> None:
    assert FORMAT == "enginesmith.qparams"
