"""What every reader of our checkpoints asks of the files: whole, named as the index says, of sound numbers.

Readers share no code with writers but the list of a Llama's tensors: they are written from the formats' descriptions.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from exporter.core.config import ModelConfig, parse_config, read_json
from exporter.core.errors import ArtifactError, InputError, UnsupportedError
from exporter.core.safetensors_file import TensorInfo, read_rows, read_whole_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": E4M3,
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
WORDS = {dtype: name for name, dtype in DTYPES.items()}
REMEDY = "build the checkpoint again; do not edit its files"
CHUNK_ELEMENTS = 1 << 20
SAME_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "rope", "attention_bias", "mlp_bias"),
)
IDENTITY = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
INPUTS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""Matrices of a layer that every server computes in one product."""

Expected = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type, in the words of safetensors, and shape of each tensor."""


def fault(kind: str, message: str) -> ArtifactError:
    """An error of a stored checkpoint."""
    return ArtifactError(f"stored.{kind}", message, REMEDY)


@contextmanager
def stored_errors() -> Iterator[None]:
    """Say what shared readers of JSON and safetensors find as an error of the artifact."""
    try:
        yield
    except (InputError, UnsupportedError) as error:
        raise fault(error.kind.rpartition(".")[2], error.message) from error


def read_object(directory: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint."""
    with stored_errors():
        return read_json(directory / name, "stored.json")


def stored_config(directory: Path, expected: ModelConfig) -> tuple[ModelConfig, dict[str, Any] | None]:
    """config.json without what it says of quantization, and that. It must describe the model that is `expected`."""
    raw = read_object(directory, "config.json")
    quantization = raw.pop("quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        raise fault("config", "config.json: quantization_config is no object")
    with stored_errors():
        found = parse_config(raw)
    for name, wanted in IDENTITY.items():
        if raw.get(name) != wanted:
            raise fault(
                "config", f"config.json has {name} {raw.get(name)!r}, not {wanted!r}: servers find no model in it"
            )
    for name in SAME_FIELDS:
        if (here := getattr(found, name)) != (there := getattr(expected, name)):
            raise fault("config", f"config.json has {name} {here}, the artifact's manifest {there}")
    return found, quantization


def open_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint's files, after checking them against the index where there is one."""
    present = {path.name for path in directory.glob("*.safetensors")}
    if SINGLE in present and not (directory / INDEX).exists():
        promised: dict[str, set[str]] | None = None
        files = {SINGLE}
    else:
        promised = _index(directory)
        files = set(promised)
    if missing := sorted(files - present):
        raise fault("shard_missing", f"{', '.join(missing[:5])} is missing in {directory.name}")
    if stray := sorted(present - files):
        raise fault("stray", f"{', '.join(stray[:5])} belongs to no index: some loaders would read it")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(files):
        with stored_errors():
            metadata, found = read_whole_header(directory / file, DTYPES)
        if metadata.get("format") != "pt":
            raise fault("metadata", f"{file}: transformers reads no file whose metadata lack format 'pt'")
        if promised is not None and promised[file] != found.keys():
            wrong = sorted(promised[file] ^ found.keys())
            raise fault("index", f"{file} and the index disagree about {', '.join(wrong[:5])}")
        tensors.update(found)
    if promised is not None:
        _check_size(directory, tensors)
    return tensors


def _index(directory: Path) -> dict[str, set[str]]:
    weight_map = read_object(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault("index", f"{INDEX} has no weight_map")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise fault("index", f"{INDEX} names no file beside it for {name}")
        files.setdefault(file, set()).add(name)
    return files


def _check_size(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    metadata = read_object(directory, INDEX).get("metadata")
    total = sum(info.nbytes for info in tensors.values())
    if not isinstance(metadata, dict) or metadata.get("total_size") != total:
        raise fault("index", f"{INDEX}: total_size is not {total}, the bytes of all tensors")


def check_layout(tensors: Mapping[str, TensorInfo], expected: Expected) -> None:
    """Exactly these tensors, in these types and shapes."""
    if missing := [name for name in expected if name not in tensors]:
        raise fault("tensor_missing", f"{len(missing)} tensors are missing: {', '.join(missing[:5])}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise fault("tensor_extra", f"{len(extra)} tensors belong to no model of this config: {', '.join(extra[:5])}")
    for name, (dtype, shape) in expected.items():
        info = tensors[name]
        if (WORDS[info.dtype], info.shape) != (dtype, shape):
            found = f"{WORDS[info.dtype]} {list(info.shape)}"
            raise fault("tensor_shape", f"{info.path.name}: {name} is {found}, the format asks {dtype} {list(shape)}")


def chunks(info: TensorInfo) -> Iterator[np.ndarray]:
    """All rows of a tensor, in portions."""
    if not info.shape:
        yield read_scalar(info).reshape(1)
        return
    step = max(1, CHUNK_ELEMENTS * info.shape[0] // max(int(np.prod(info.shape)), 1))
    for start in range(0, info.shape[0], step):
        with stored_errors():
            yield read_rows(info, start, min(start + step, info.shape[0]))


def read_scalar(info: TensorInfo) -> np.ndarray:
    """The value of a tensor of shape [] or [1], as an array of shape []."""
    one = TensorInfo(info.name, info.path, info.dtype, (1,), info.offset, info.nbytes)
    with stored_errors():
        return read_rows(one, 0, 1).reshape(())


def read_kv_scales(
    tensors: Mapping[str, TensorInfo], layers: int, names: Callable[[int], tuple[str, str]]
) -> dict[int, tuple[float, float]]:
    """Scales of keys and values of each layer, from the tensors that `names` tells."""
    found = {}
    for layer in range(layers):
        keys, values = (float(read_scalar(tensors[name])) for name in names(layer))
        found[layer] = (keys, values)
    return found


def check_scales(info: TensorInfo, least: float = 0.0, most: float = float(np.finfo(np.float32).max)) -> None:
    """Every scale is a number above `least`, or above zero, and at most `most`."""
    for values in chunks(info):
        wide = values.astype(np.float32)
        good = np.isfinite(wide) & (wide > 0) & (wide >= np.float32(least)) & (wide <= np.float32(most))
        if not good.all():
            where = f"{info.path.name}: {info.name} holds {float(wide[~good].flat[0]):g}"
            raise fault("scale", f"{where}; a scale is a number above 0" + _range(least, most))


def _range(least: float, most: float) -> str:
    return f", from {least:g} to {most:g} here" if least or most < 1e38 else ""


def check_finite(info: TensorInfo) -> None:
    """No NaN and no infinity: floats, and E4M3, whose two codes of all ones are NaN."""
    for values in chunks(info):
        if info.dtype == E4M3:
            good = bool(((values.view(np.uint8) & 0x7F) != 0x7F).all())
        else:
            good = bool(np.isfinite(values.astype(np.float32)).all())
        if not good:
            raise fault("not_finite", f"{info.path.name}: {info.name} holds NaN or Inf")


def check_shared(tensors: Mapping[str, TensorInfo], modules: Sequence[str], part: str) -> None:
    """The matrices of one product have one such scale: TensorRT-LLM asserts it when it loads (`load_weight_scales` in
    tensorrt_llm/_torch/modules/linear.py)."""
    names = [f"{module}.{part}" for module in modules if f"{module}.{part}" in tensors]
    values = [float(read_scalar(tensors[name])) for name in names]
    if len(set(values)) > 1:
        what = ", ".join(f"{name} {value:g}" for name, value in zip(names, values, strict=True))
        raise fault("shared_scale", f"{tensors[names[0]].path.name}: matrices with one input share a scale, not {what}")


def matches(module: str, patterns: Iterable[str]) -> bool:
    """Whether a list of modules, with wildcards, names this one."""
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def float_type(config: ModelConfig) -> str:
    """The type of tensors that are not quantized, as config.json says."""
    named = str(config.raw.get("dtype") or config.raw.get("torch_dtype"))
    found = {"bfloat16": "BF16", "float16": "F16"}.get(named)
    if found is None:
        raise fault("config", f"config.json has dtype {named}, not bfloat16 or float16")
    return found


def layer_modules(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shape [N, K] of each matrix of the layers, by `model.layers.0.self_attn.q_proj`."""
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config.num_layers)
        for name, shape in config.linear_shapes.items()
    }


def products(config: ModelConfig) -> Iterator[list[str]]:
    """Modules that are computed in one product."""
    for layer in range(config.num_layers):
        for names in INPUTS:
            yield [f"model.layers.{layer}.{name}" for name in names]


@dataclass(frozen=True)
class ModuleTensors:
    """The stored tensors of one module by their last name, `weight_scale`."""

    module: str
    tensors: Mapping[str, TensorInfo]

    def rows(self, part: str, start: int, stop: int) -> np.ndarray:
        with stored_errors():
            return read_rows(self.tensors[f"{self.module}.{part}"], start, stop)

    def scalar(self, part: str) -> np.float32:
        return np.float32(read_scalar(self.tensors[f"{self.module}.{part}"]))

    def has(self, part: str) -> bool:
        return f"{self.module}.{part}" in self.tensors

    def width(self, part: str) -> int:
        return self.tensors[f"{self.module}.{part}"].shape[-1]


def by_group(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [n, K] times the scales [n, G] of its groups."""
    (count, width), groups = values.shape, scales.shape[1]
    parts = values.astype(np.float32).reshape(count, groups, width // groups)
    return (parts * scales.astype(np.float32)[:, :, None]).reshape(count, width)


def e2m1(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, K / 2], the even column in the low nibble -> float32 [n, K]."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    table = np.concatenate([levels, -levels])
    out = np.empty((codes.shape[0], 2 * codes.shape[1]), np.float32)
    out[:, 0::2], out[:, 1::2] = table[codes & 15], table[codes >> 4]
    return out
