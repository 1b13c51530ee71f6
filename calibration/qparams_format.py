"""The layout of a file of quantization parameters: names of tensors, metadata, and their JSON (docs/qparams.md)."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.transforms import CONSUMERS, POINTS, FoldNorms, RotateHeads, RotateResidual, ScaleInput, Transform
from exporter.core.errors import EngineSmithError, InputError
from exporter.core.recipe import Precision, all_precisions
from exporter.core.safetensors_file import TensorInfo
from exporter.core.strict_json import parse_json, shorten

FORMAT, VERSION = "enginesmith.qparams", 1
DTYPES: dict[str, np.dtype] = {"F32": np.dtype(np.float32), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8)}
HEAD_POINT = "head_input"
ROTATIONS: dict[str, type[RotateResidual | RotateHeads]] = {
    "rotate_residual": RotateResidual,
    "rotate_heads": RotateHeads,
}
SHARED_SCALES = [list(modules) for modules in CONSUMERS.values() if len(modules) > 1]
REMEDY = "run `enginesmith calibrate` again"
MAX_SEED = 1 << 63

PRECISIONS = {precision.describe(): precision for precision in all_precisions() if precision.is_coded}
CODES = re.compile(r"(?P<tensor>[\w.]+):(?P<precision>[a-z0-9/]+)\.(?P<part>codes|scales|zero_points)")
AMAX = re.compile(rf"model\.layers\.\d{{1,6}}\.({'|'.join(POINTS)})\.(amax|clip)|{HEAD_POINT}\.(amax|clip)")
KV_AMAX = re.compile(r"model\.layers\.\d{1,6}\.[kv]_amax")
TRANSFORM_SCALE = re.compile(r"transforms\.\d{1,6}\.scale")


@dataclass(frozen=True)
class StoredCodes:
    """Where the codes of one tensor at one precision lie. `width` is K."""

    tensor: str
    precision: Precision
    width: int
    codes: TensorInfo
    scales: TensorInfo
    zero_points: TensorInfo | None


def codes_key(tensor: str, precision: Precision) -> str:
    """What names of codes, scales and zero points begin with: `model.layers.0.mlp.up_proj.weight:int4/g32`."""
    return f"{tensor}:{precision.weight_only.describe()}"


def point_key(layer: int | None, point: str) -> str:
    """`model.layers.0.mlp_input`, or `head_input`."""
    return point if layer is None else f"model.layers.{layer}.{point}"


def codes_dtype(precision: Precision) -> np.dtype:
    """int8 for signed integers of a byte; packed codes, unsigned ones and those of floats are uint8."""
    return np.dtype(np.int8 if precision.is_integer and precision.symmetric and precision.bits > 4 else np.uint8)


def stored_width(precision: Precision, width: int) -> int:
    """Bytes of a row of codes: two codes of 4 bits a byte, else one."""
    return width // 2 if precision.bits == 4 else width


def parse_codes(tensors: Mapping[str, TensorInfo]) -> dict[str, StoredCodes]:
    """All codes of a file by `codes_key`, after checking that parts, dtypes and shapes fit one another."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if found := CODES.fullmatch(name):
            parts.setdefault(f"{found['tensor']}:{found['precision']}", {})[found["part"]] = info
        else:
            _check_statistic(name, info)
    return {key: _stored_codes(key, found) for key, found in parts.items()}


def _stored_codes(key: str, parts: Mapping[str, TensorInfo]) -> StoredCodes:
    tensor, _, described = key.rpartition(":")
    precision = PRECISIONS.get(described)
    if precision is None or precision.activations:
        raise damaged("tensor", f"{shorten(key)} names no precision of codes")
    wanted = {"codes", "scales"} | (set() if precision.symmetric else {"zero_points"})
    if parts.keys() != wanted:
        raise damaged("tensor", f"{shorten(key)} has {', '.join(sorted(parts))}, not {', '.join(sorted(wanted))}")
    codes, scales, zeros = parts["codes"], parts["scales"], parts.get("zero_points")
    if codes.dtype != codes_dtype(precision) or scales.dtype != DTYPES["F32"]:
        raise damaged("tensor", f"{shorten(key)} is stored as {codes.dtype} with scales {scales.dtype}")
    if len(codes.shape) != 2 or min(codes.shape) < 1:
        raise damaged("tensor", f"{shorten(key)} has codes of shape {list(codes.shape)}")
    width = codes.shape[1] * (2 if precision.bits == 4 else 1)
    expected = (codes.shape[0], precision.groups(width))
    if not precision.divides(width) or any(part.shape != expected for part in (scales, zeros) if part):
        raise damaged("tensor", f"{shorten(key)} has rows of {width} and scales of shape {list(scales.shape)}")
    if zeros is not None and zeros.dtype != DTYPES["U8"]:
        raise damaged("tensor", f"{shorten(key)} has zero points stored as {zeros.dtype}")
    return StoredCodes(tensor, precision, width, codes, scales, zeros)


def _check_statistic(name: str, info: TensorInfo) -> None:
    if not any(pattern.fullmatch(name) for pattern in (AMAX, KV_AMAX, TRANSFORM_SCALE)):
        raise damaged("tensor", f"it holds {shorten(name)}, which has no meaning here")
    if info.dtype != DTYPES["F32"] or len(info.shape) != 1 or (name.endswith(".clip") and info.shape != (1,)):
        raise damaged("tensor", f"{name} is {info.dtype} of shape {list(info.shape)}")


def transforms_to_json(transforms: Sequence[Transform]) -> list[dict[str, Any]]:
    """In order; the scale of the n-th lies in the tensor `transforms.n.scale`."""
    return [_transform_to_json(transform) for transform in transforms]


def _transform_to_json(transform: Transform) -> dict[str, Any]:
    match transform:
        case FoldNorms():
            return {"kind": "fold_norms"}
        case RotateResidual(seed):
            return {"kind": "rotate_residual", "seed": seed}
        case RotateHeads(seed):
            return {"kind": "rotate_heads", "seed": seed}
        case ScaleInput():
            return {"kind": "scale_input", "layer": transform.layer, "point": transform.point}


def transform_from_json(value: object, scale: np.ndarray | None) -> Transform:
    """One transform; `scale` is the tensor that lies at its place, if there is one."""
    if not isinstance(value, dict) or not isinstance(kind := value.get("kind"), str):
        raise damaged("transforms", f"{shorten(value)} is no transform")
    rest = {name: entry for name, entry in value.items() if name != "kind"}
    if kind == "scale_input" and rest.keys() == {"layer", "point"} and scale is not None:
        if _is_count(rest["layer"], 1 << 31) and isinstance(rest["point"], str):
            return ScaleInput(rest["layer"], rest["point"], scale)
    elif kind == "fold_norms" and not rest and scale is None:
        return FoldNorms()
    elif kind in ROTATIONS and rest.keys() == {"seed"} and _is_count(rest["seed"], MAX_SEED) and scale is None:
        return ROTATIONS[kind](rest["seed"])
    raise damaged("transforms", f"{shorten(value)} is no transform of this version")


def to_text(value: object, *, sort_keys: bool = True) -> str:
    """JSON whose bytes depend on the value alone."""
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def from_text(metadata: Mapping[str, str], name: str) -> Any:
    """The JSON of one entry of the metadata, which must be there."""
    try:
        return parse_json(metadata[name].encode())
    except KeyError:
        raise damaged("metadata", f"its metadata lack {name!r}") from None
    except ValueError as error:
        raise damaged("metadata", f"{name} is not sound JSON: {error}") from error


def check_format(metadata: Mapping[str, str], file: str) -> None:
    """InputError unless it is a file of parameters, of a version known here."""
    if metadata.get("format") != FORMAT:
        what = f"{file} is a safetensors file, but holds no quantization parameters"
        raise InputError("qparams.format", what, "give a file that `enginesmith calibrate` wrote")
    version = metadata.get("version", "")
    if not version.isascii() or not version.isdigit() or len(version) > 9:
        raise damaged("version", f"its version is {shorten(version)}")
    if int(version) != VERSION:
        what = f"{file} has version {version} of the format, this enginesmith reads version {VERSION}"
        raise InputError("qparams.version", what, "use the enginesmith that wrote it, or calibrate again")


@contextmanager
def qparams_errors() -> Iterator[None]:
    """Errors about safetensors files in general become errors about this file, under `qparams.*`."""
    try:
        yield
    except EngineSmithError as error:
        if not error.kind.startswith("checkpoint."):
            raise
        kind = error.kind.replace("checkpoint.", "qparams.", 1)
        raise InputError(kind, error.message, REMEDY) from error


def damaged(kind: str, why: str) -> InputError:
    return InputError(f"qparams.{kind}", f"the file of quantization parameters is damaged: {why}", REMEDY)


def _is_count(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
