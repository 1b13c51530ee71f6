"""Quantization parameters in one file, read on demand (docs/qparams.md)."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from calibration import qparams_format as layout
from calibration.codecs import unpack_nibbles
from calibration.qparams_check import check_codes, check_fits, check_scales
from calibration.qparams_format import StoredCodes, damaged, qparams_errors
from calibration.recipe_json import recipe_from_json
from calibration.transformed import TransformedCheckpoint
from calibration.transforms import Transform, point_of
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.core.recipe import Precision, Recipe
from exporter.core.safetensors_file import TensorInfo, read_rows, read_whole_header
from exporter.core.strict_json import shorten
from exporter.core.weights import QuantizedRows

LINEAR = re.compile(r"(model\.layers\.\d+)\.((?:self_attn|mlp)\.\w+_proj)")
TOPS = {"int8": np.float32(127), "fp8": np.float32(448), "nvfp4": np.float32(6 * 448)}
"""Magnitude that a scale maps the largest value to; nvfp4: the largest code times the largest scale of a block."""
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class QParams:
    """One file of parameters. Opening reads its header and the transforms' scales; the rest comes when asked for.

    `source_digest` is the checkpoint's, `data` says what text it was calibrated on (None: on none), `reports` what
    the algorithms found for each module. `part` names a piece of a calibration under way; a whole file has None.
    `codes` are those that `rows` gives out, by `tensor:precision`.
    """

    path: Path
    source_digest: str
    recipe: Recipe
    data: Mapping[str, object] | None
    transforms: tuple[Transform, ...]
    reports: Mapping[str, Mapping[str, object]]
    part: str | None
    codes: Mapping[str, StoredCodes]
    tensors: Mapping[str, TensorInfo]

    @staticmethod
    def open(path: Path | str) -> "QParams":
        """Open a file and check its header.

        Raises InputError (`qparams.*`) for a file that is damaged, of another kind or of another version.
        """
        path = Path(path)
        with qparams_errors():
            metadata, tensors = _read_header(path)
            layout.check_format(metadata, path.name)
            return _parse(path, metadata, tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, hexadecimal."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise damaged("unreadable", f"the system refuses to read it ({error.strerror})") from error

    def check(self, checkpoint: Checkpoint) -> None:
        """InputError unless the file is whole (`qparams.part`), was made from this checkpoint
        (`qparams.other_checkpoint`) and fits it (`qparams.shape`, `transform.*`)."""
        self._check_whole()
        if self.source_digest != checkpoint.digest:
            raise InputError(
                "qparams.other_checkpoint",
                f"{self.path.name} belongs to a checkpoint with digest {self.source_digest[:12]}.., "
                f"this one has {checkpoint.digest[:12]}..",
                "calibrate this checkpoint, or give the one the file was made from",
            )
        self.check_config((checkpoint.original if isinstance(checkpoint, TransformedCheckpoint) else checkpoint).config)

    def check_config(self, config: ModelConfig) -> None:
        """The same as far as the architecture alone tells: no weight is read, so no digest is compared."""
        self._check_whole()
        check_fits(config, self.transforms, self.codes, self.tensors)

    def _check_whole(self) -> None:
        if self.part is not None:
            what = f"{self.path.name} is a piece of a calibration under way ({shorten(self.part)})"
            raise InputError("qparams.part", what, "give the file that `enginesmith calibrate` wrote at its end")

    def rows(self, tensor: str, precision: Precision, start: int, stop: int) -> QuantizedRows | None:
        """Rows [start, stop) of a tensor as an algorithm chose them; None: round the transformed values to nearest."""
        stored = self.codes.get(layout.codes_key(tensor, precision))
        if stored is None:
            return None
        with qparams_errors():
            codes, scales = read_rows(stored.codes, start, stop), read_rows(stored.scales, start, stop)
            zeros = read_rows(stored.zero_points, start, stop) if stored.zero_points else None
        if stored.precision.bits == 4:
            signed = stored.precision.is_integer and stored.precision.symmetric
            codes = unpack_nibbles(codes, stored.width, signed=signed)
        rows = QuantizedRows(codes, scales, zeros, precision)
        check_scales(scales, stored.precision, tensor)
        check_codes(rows, tensor)
        return rows

    def input_amax(self, module: str) -> np.ndarray | None:
        """Largest |x| of each input channel of `model.layers.0.self_attn.q_proj` or `lm_head`: float32 [K]."""
        return self._magnitudes(f"{_point(module)}.amax")

    def input_scale(self, module: str, activations: str) -> float:
        """The scale that rounds a module's whole input: amax / 127 (int8/..), amax / 448 (fp8/..) or
        amax / (6 * 448) (nvfp4/..), in float32.

        Where an observer clipped, its limit stands for amax. InputError where the file has neither.
        """
        key = _point(module)
        found = self._magnitudes(f"{key}.clip")
        amax = self._magnitudes(f"{key}.amax") if found is None else found
        if amax is None:
            what = f"{self.path.name} has no statistics of the input of {module}"
            raise InputError("qparams.input_scale", what, "calibrate with a recipe that rounds activations")
        return _scale(amax, activations.split("/")[0])

    def kv_amax(self, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Largest |k| (after rotation) and |v| of each channel: float32 [Hkv * D] each."""
        keys, values = (self._magnitudes(f"model.layers.{layer}.{part}_amax") for part in "kv")
        return None if keys is None or values is None else (keys, values)

    def kv_scales(self, layer: int, kind: str) -> tuple[float, float]:
        """Scales of all keys and of all values of a layer for a cache of `int8` or `fp8`: amax / 127 or / 448."""
        amax = self.kv_amax(layer)
        if amax is None:
            what = f"{self.path.name} has no statistics of the keys and values of layer {layer}"
            raise InputError("qparams.kv_scale", what, f"calibrate with --kv-cache {kind}")
        return _scale(amax[0], kind), _scale(amax[1], kind)

    def _magnitudes(self, name: str) -> np.ndarray | None:
        """A statistic, float32 [K]; None where the file has none."""
        info = self.tensors.get(name)
        if info is None:
            return None
        with qparams_errors():
            values = read_rows(info, 0, info.shape[0])
        if not (np.isfinite(values) & (values >= 0)).all():
            raise damaged("amax", f"{name} holds numbers that are no magnitudes")
        return values


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    if not path.is_file():
        what = f"{path} is a directory" if path.is_dir() else f"{path} is no file"
        raise InputError("qparams.missing", what, "give a file that `enginesmith calibrate` wrote")
    return read_whole_header(path, layout.DTYPES)


def _parse(path: Path, metadata: Mapping[str, str], tensors: dict[str, TensorInfo]) -> QParams:
    known = {"format", "version", "source_digest", "recipe", "data", "transforms", "shared_scales", "reports", "part"}
    if unknown := sorted(metadata.keys() - known):
        raise damaged("metadata", f"its metadata have the unknown entry {shorten(unknown[0])}")
    digest = metadata.get("source_digest", "")
    if not SHA256.fullmatch(digest):
        raise damaged("metadata", f"its source_digest is {shorten(digest)}")
    if layout.from_text(metadata, "shared_scales") != layout.SHARED_SCALES:
        raise damaged("metadata", "its shared_scales are not those of this version")
    return QParams(
        path=path,
        source_digest=digest,
        recipe=recipe_from_json(layout.from_text(metadata, "recipe")),
        data=_data(layout.from_text(metadata, "data")),
        transforms=_transforms(layout.from_text(metadata, "transforms"), tensors),
        reports=_reports(layout.from_text(metadata, "reports")),
        part=metadata.get("part"),
        codes=layout.parse_codes(tensors),
        tensors=tensors,
    )


def _data(value: object) -> dict[str, object] | None:
    if value is None:
        return None
    plain = isinstance(value, dict) and all(isinstance(entry, str | int) for entry in value.values())
    if not isinstance(value, dict) or not plain:
        raise damaged("metadata", f"data is {shorten(value)}")
    return value


def _reports(value: object) -> dict[str, dict[str, object]]:
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        raise damaged("metadata", f"reports is {shorten(value)}")
    return value


def _transforms(value: object, tensors: Mapping[str, TensorInfo]) -> tuple[Transform, ...]:
    if not isinstance(value, list):
        raise damaged("transforms", f"transforms is {shorten(value)}")
    scales = {name: info for name, info in tensors.items() if layout.TRANSFORM_SCALE.fullmatch(name)}
    found = []
    for index, entry in enumerate(value):
        info = scales.pop(f"transforms.{index}.scale", None)
        if info and (info.dtype != layout.DTYPES["F32"] or len(info.shape) != 1):
            raise damaged("tensor", f"{info.name} is {info.dtype} of shape {list(info.shape)}")
        scale = read_rows(info, 0, info.shape[0]) if info else None
        found.append(layout.transform_from_json(entry, scale))
    if scales:
        raise damaged("transforms", f"{min(scales)} belongs to no transform")
    return tuple(found)


def _point(module: str) -> str:
    """`model.layers.0.self_attn.q_proj` -> `model.layers.0.attention_input`; `lm_head` -> `head_input`."""
    if module == "lm_head":
        return layout.HEAD_POINT
    found = LINEAR.fullmatch(module)
    if found is None:
        raise ValueError(f"{module!r} is no matrix of a Llama")
    return f"{found[1]}.{point_of(found[2])}"


def _scale(amax: np.ndarray, kind: str) -> float:
    """1 where everything was zero; never so small that it is zero itself."""
    largest = amax.max(initial=np.float32(0))
    return float(max(largest / TOPS[kind], np.finfo(np.float32).tiny)) if largest else 1.0
